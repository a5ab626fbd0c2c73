"""Evicting while decoding is what a plain loop does with a mask over all tokens."""

import itertools

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from hf_kvcache import new_cache, patch_model
from hf_kvcache.methods import H2O, Uniform
from hf_kvcache.testing import random_ids, tiny_model


def decode(model, cache, ids, steps):
    """Greedy steps through plain forwards; returns the logits of all of them."""
    found = []
    with torch.no_grad():
        for _ in range(steps):
            logits = model(ids, past_key_values=cache).logits[:, -1:]
            ids = logits.argmax(-1)
            found.append(logits)
    return torch.cat(found, dim=1)


def plain_decoding(model, ids, steps, every, choose, record=dict):
    """The unpatched model, token by token over all tokens, with a mask of its own for every layer and head.

    Args:
        choose: gets a layer's attention weights of the last forward `[H_q, L, T]` and what is held `[H_kv, T]`, layer
            after layer; returns what stays.
        record: makes the mapping that a forward's weights are put into, by layer.
    """
    found = []
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    group = model.config.num_attention_heads // heads
    prompt = ids.shape[1]
    state = {"keep": None}

    def attention(module, query, key, value, mask, scaling, **kwargs):
        logits = query @ key.repeat_interleave(group, 1).mT * scaling
        length, tokens = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(length, tokens).tril(tokens - length) == 0, -torch.inf)
        if state["keep"] is not None:
            there = torch.ones(heads, tokens, dtype=torch.bool)
            there[:, : state["keep"].shape[-1]] = state["keep"][module.layer_idx]
            logits = logits.masked_fill(~there.repeat_interleave(group, 0)[None, :, None], -torch.inf)
        weights = logits.softmax(-1)
        state["weights"][module.layer_idx] = weights[0]
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register("plain_for_test", attention)
    AttentionMaskInterface.register("plain_for_test", sdpa_mask)
    model.set_attn_implementation("plain_for_test")
    cache = DynamicCache(config=model.config)
    since = None
    with torch.no_grad():
        for _ in range(steps):
            state["weights"] = record()
            logits = model(ids, past_key_values=cache).logits[:, -1:]
            ids = logits.argmax(-1)
            found.append(logits)
            seen = cache.get_seq_length()
            since = since if since is not None else seen
            if seen == prompt or seen - since == every:
                since = seen
                before = state["keep"]
                there = torch.ones(layers, heads, seen, dtype=torch.bool)
                if before is not None:
                    there[..., : before.shape[-1]] = before
                state["keep"] = torch.stack([choose(state["weights"][i], there[i]) for i in range(layers)])
    return torch.cat(found, dim=1), state["keep"]


def tova_by_loop(weights, there, budget):
    """The budget's worth of tokens with the most attention of the last query, averaged over all heads."""
    columns = [t for t in range(there.shape[-1]) if bool(there[0, t])]
    worth = {t: sum(float(weights[h, -1, t]) for h in range(len(weights))) for t in columns}
    best = sorted(columns, key=worth.__getitem__, reverse=True)[:budget]
    return torch.tensor([[t in best for t in range(there.shape[-1])]] * len(there))


def recent_by_loop(weights, there, budget):
    columns = [t for t in range(there.shape[-1]) if bool(there[0, t])]
    best = columns[:4] + columns[4:][-(budget - 4) :] if len(columns) > budget else columns
    return torch.tensor([[t in best for t in range(there.shape[-1])]] * len(there))


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(
    ("scorer", "choose"), [("tova", tova_by_loop), ("streamingllm", recent_by_loop)], ids=["tova", "streamingllm"]
)
def test_evicting_while_decoding_is_what_a_plain_loop_does(scorer, choose, every):
    budget, ids = 14, random_ids(length=30)
    expected, kept = plain_decoding(
        tiny_model("llama"), ids, 40, every, lambda weights, there: choose(weights, there, budget)
    )
    model = patch_model(tiny_model("llama"), scorer, budget=budget, every=every)
    cache = new_cache(model)
    actual = decode(model, cache, ids, 40)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)
    for layer, mine in zip(cache.layers, kept, strict=True):
        segment = layer.segments[0]
        for head in range(2):
            positions = segment.positions()[segment.layout.owners == head].sort().values
            assert torch.equal(positions, mine[head].nonzero()[:, 0])


def test_h2o_sums_over_all_queries_so_far_of_the_tokens_that_stay():
    budget, every, ids = 14, 5, random_ids(length=30)
    sums: dict[int, torch.Tensor] = {}
    calls = itertools.count()
    step_weights: dict[int, list] = {}

    def choose(weights, there):
        layer = next(calls) % 4
        received = torch.zeros(there.shape)
        for tokens in step_weights[layer]:
            for head in range(2):
                part = tokens[3 * head : 3 * head + 3].sum(1).mean(0)
                received[head, : len(part)] += part
        step_weights[layer] = []
        if layer in sums:
            received[:, : sums[layer].shape[1]] += sums[layer]
        sums[layer] = received
        kept = torch.zeros_like(there)
        for head in range(2):
            columns = there[head].nonzero()[:, 0].tolist()
            recent = columns[-budget // 2 :]
            others = sorted(columns[: -budget // 2], key=lambda t: float(received[head, t]), reverse=True)
            kept[head, recent + others[: budget - budget // 2]] = True
        return kept

    class Recorded(dict):
        def __setitem__(self, layer, weights):
            step_weights.setdefault(layer, []).append(weights)
            super().__setitem__(layer, weights)

    expected, kept = plain_decoding(tiny_model("llama"), ids, 25, every, choose, Recorded)
    model = patch_model(tiny_model("llama"), "h2o", budget=budget, every=every)
    cache = new_cache(model)
    torch.testing.assert_close(decode(model, cache, ids, 25), expected, rtol=1e-4, atol=2e-4)
    for layer, mine in zip(cache.layers, kept, strict=True):
        positions, owners = layer.segments[0].positions(), layer.segments[0].layout.owners
        for head in range(2):
            assert torch.equal(positions[owners == head].sort().values, mine[head].nonzero()[:, 0])


def test_a_residual_neither_hastens_evicting_while_decoding_nor_takes_from_the_sums():
    def decoded(residual):
        method = [H2O(budget=32, every=8), Uniform(bits=8, residual_length=residual)]
        cache = new_cache(patch_model(model := tiny_model("llama"), method))
        return decode(model, cache, random_ids(length=60), 30), cache

    (logits, cache), (expected, plain) = decoded(16), decoded(0)
    assert torch.equal(logits, expected)
    for layer, own in zip(cache.layers, plain.layers, strict=True):
        assert layer.tail.length == own.tail.length == 29 % 8
        (segment,), (other,) = layer.segments, own.segments
        assert all(torch.equal(tensor, other.held[name]) for name, tensor in segment.held.items())
