"""The laws of eviction, for every scorer, allocator and selector: exact budgets, what is always kept, and the bound.

First on single observations, then on tiny models, where also batches, padding and eviction while decoding count.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from hf_kvcache import new_cache, patch_model
from hf_kvcache.eviction import EvictionPolicy, HeadImportance, TopK, Uniform, perturbation_bound
from hf_kvcache.eviction.roles import largest_remainder, top_mask
from hf_kvcache.methods import METHODS, AdaKV, CriticalKV, HeadKV, SnapKV, StreamingLLM
from hf_kvcache.testing import left_pad, live_bytes, random_ids, random_observation, tiny_model

SCORERS = [name for name, method in METHODS.items() if method.slot == "scorer"]
ALLOCATORS = [name for name, method in METHODS.items() if method.slot == "allocator"]
SELECTORS = [name for name, method in METHODS.items() if method.slot == "selector"]
DECODING = [name for name in SCORERS if METHODS[name].while_decoding]
# (scorer, allocator, selector): each alone, and all that CriticalKV was published with
TRIPLES = [
    *((scorer, "uniform", "top-k") for scorer in SCORERS),
    *((scorer, "adakv", "criticalkv") for scorer in SCORERS),
    *(("snapkv", allocator, selector) for allocator in ALLOCATORS for selector in ("top-k", *SELECTORS)),
]
# small enough for prompts of some forty tokens
SMALL = {
    "snapkv": {"window": 6},
    "defensivekv": {"window": 6},
    "rkv": {"window": 4, "every": None},
    "lagkv": {"lag": 8},
    "expected_attention": {"horizon": 8},
    "knorm": {"sinks": 2, "window": 3},
    "kvzip": {"instructions": ((5, 6, 7), (8, 9)), "chunk": 16},
}
LENGTH = 40


class NoRotation:
    """Stands for the rotary embedding of a layer that has none."""

    def __call__(self, vectors, positions, inverse=False):
        return vectors.float()

    def mean(self, positions):
        return torch.eye(8)


def build(name: str, **options):
    if name in ("uniform", "top-k"):
        return {"uniform": Uniform(), "top-k": TopK()}[name]
    if name == "headkv":
        options = {
            "importance": HeadImportance(torch.rand(4, 6, generator=torch.Generator().manual_seed(3))),
            **options,
        }
    return METHODS[name](**{**SMALL.get(name, {}), **options})


def methods_of(triple, **options):
    """Method instances for `patch_model`; the scorer carries the budget."""
    scorer, *others = triple
    return [build(scorer, **options), *(build(name) for name in others if name not in ("uniform", "top-k"))]


def observe(**fields):
    observed = random_observation(tokens=LENGTH, queries=LENGTH, heads=2, **fields)
    readings = [replace(reading, rotate=NoRotation()) for reading in observed.readings]
    return replace(observed, readings=readings, replayed=observed.key.norm(dim=-1))


def layers_of(policy, num_layers=4, **fields):
    """What the policy keeps in each of several layers, `[B, H_kv, T]`, all when it drops nothing."""
    readers = tuple((layer,) for layer in range(num_layers))
    for layer in range(num_layers):
        observed = observe(layer=layer, num_layers=num_layers, readers=readers, seed=layer, **fields)
        decided = policy.keep(observed)
        yield observed, torch.ones(observed.key.shape[:3], dtype=torch.bool) if decided is None else decided[0]


@pytest.mark.parametrize("budget", [12, 25, 39, 0.4, 0.03])
@pytest.mark.parametrize("triple", TRIPLES, ids="+".join)
def test_budgets_are_exact_and_window_and_sinks_stay(triple, budget):
    scorer, allocator, selector = map(build, triple)
    policy = EvictionPolicy(scorer, allocator, selector, budget)
    tokens, sinks, window = policy.limits(LENGTH)
    assert tokens == budget if isinstance(budget, int) else tokens == max(int(budget * LENGTH), sinks + window)
    total = 0
    for _, kept in layers_of(policy):
        by_row = kept.sum((1, 2))
        assert torch.equal(by_row[:1].expand_as(by_row), by_row)
        assert bool(kept[..., :sinks].all()) and bool(kept[..., LENGTH - window :].all())
        if triple[1] not in ("pyramidkv", "headkv"):
            assert int(by_row[0]) == tokens * 2
        total += int(by_row[0])
    assert total == tokens * 2 * 4


@pytest.mark.parametrize("budget", [LENGTH, LENGTH + 9, 1.0])
@pytest.mark.parametrize("triple", TRIPLES, ids="+".join)
def test_a_budget_of_the_whole_length_keeps_everything(triple, budget):
    scorer, allocator, selector = map(build, triple)
    policy = EvictionPolicy(scorer, allocator, selector, budget)
    assert all(bool(kept.all()) for _, kept in layers_of(policy))


@pytest.mark.parametrize("scorer", DECODING)
@pytest.mark.parametrize("others", [("uniform", "top-k"), ("adakv", "criticalkv")], ids="+".join)
def test_what_is_not_there_is_never_kept(scorer, others):
    policy = EvictionPolicy(build(scorer), *map(build, others), budget=20, every=4)
    for observed, kept in layers_of(policy, holes=6, batch=3):
        assert not bool((kept & ~observed.valid).any())
        for row, (held, there) in enumerate(zip(kept.sum(-1), observed.valid.sum(-1), strict=True)):
            assert int(held.sum()) == min(40, int(there.sum())), row


@pytest.mark.parametrize(
    "host", [SnapKV(window=6), build("knorm"), build("keydiff"), build("h2o")], ids=lambda m: m.name
)
@pytest.mark.parametrize("allocator", ["uniform", "adakv"])
def test_criticalkv_with_one_stage_is_its_host(host, allocator):
    plain = EvictionPolicy(host, build(allocator), TopK(), 20)
    staged = EvictionPolicy(host, build(allocator), CriticalKV(first_stage=1.0), 20)
    for (_, one), (_, other) in zip(layers_of(plain), layers_of(staged), strict=True):
        assert torch.equal(one, other)


def test_scores_that_are_not_finite_drop_nothing_and_say_where():
    observed = observe()
    observed.key[0, 0, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"'keydiff' gave a score that is not finite in layer 0"):
        EvictionPolicy(build("keydiff"), budget=10).keep(observed)


def test_a_budget_within_what_is_always_kept_is_refused():
    with pytest.raises(ValueError, match="must exceed the tokens that 'snapkv' always keeps: 0 first and 64 last"):
        EvictionPolicy(SnapKV(), budget=64)
    with pytest.raises(ValueError, match="must exceed the tokens that 'streamingllm' always keeps: 4 first and 0 last"):
        EvictionPolicy(StreamingLLM(), budget=4)
    with pytest.raises(ValueError, match="which 'lagkv' is not defined for"):
        EvictionPolicy(build("lagkv"), budget=20, every=4)


# the bound of CriticalKV


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_theta_is_never_violated_and_two_stages_lower_theta_hat(norm):
    judged = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        weights = (2.5 * torch.randn(64, generator=generator, dtype=torch.float64)).softmax(-1)
        value = torch.randn(64, 8, generator=generator, dtype=torch.float64) * torch.rand(64, 1, generator=generator)
        output = torch.randn(8, 32, generator=generator, dtype=torch.float64)
        count = int(torch.randint(2, 60, (), generator=generator))
        counts = torch.tensor([[count]])
        projection = torch.nn.Linear(8, 32, bias=False)
        projection.weight.data = output.T.float()
        observed = random_observation(batch=1, heads=1, group=1, tokens=64, dim=8)
        observed = replace(
            observed, value=value.float()[None, None], readings=[replace(observed.readings[0], output=projection)]
        )
        score = weights.float()[None, None]
        first = top_mask(score, counts // 2)[0, 0]
        for selection in (CriticalKV(norm=norm).select(score, counts, observed), top_mask(score, counts)):
            keep = selection[0, 0]
            assert int(keep.sum()) == count and bool(keep[first].all())
            bound = perturbation_bound(weights, value, output, keep)
            assert float(bound.actual) <= float(bound.theta) + 1e-9
        sigma = float(weights[first].sum())
        if norm == "l1" and sigma > 0.5:
            judged += 1
            staged, plain = (
                perturbation_bound(weights, value, output, keep[0, 0], first)
                for keep in (CriticalKV(norm=norm).select(score, counts, observed), top_mask(score, counts))
            )
            # epsilon lets a token of no attention in now and then; its part in the bound is as small
            slack = 1e-4 * float((value @ output).abs().sum(-1).max()) * count
            assert float(staged.theta) <= float(staged.theta_hat) + 1e-9
            assert float(staged.theta_hat) <= float(plain.theta_hat) + slack
    assert norm == "l2" or judged > 100


def test_the_perturbation_is_that_of_renormalised_attention():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(30, generator=generator, dtype=torch.float64)
        value, output = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((30, 8), (8, 16)))
        keep = torch.rand(30, generator=generator) < 0.5
        full = logits.softmax(-1) @ value @ output
        evicted = logits[keep].softmax(-1) @ value[keep] @ output
        bound = perturbation_bound(logits.softmax(-1), value, output, keep)
        torch.testing.assert_close(bound.actual, (full - evicted).abs().sum())


def test_largest_remainder_is_exact_and_within_its_limits():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        parts = int(torch.randint(1, 9, (), generator=generator))
        share = torch.rand(3, parts, generator=generator) ** 3
        limit = torch.randint(0, 20, (3, parts), generator=generator)
        total = int(torch.randint(0, 60, (), generator=generator))
        given = largest_remainder(share, total, limit)
        assert bool((given >= 0).all()) and bool((given <= limit).all())
        assert torch.equal(given.sum(-1), limit.sum(-1).clamp(max=total))


# on models


@torch.no_grad()
def prefilled(model, ids, **kwargs):
    cache = new_cache(model)
    model(ids, past_key_values=cache, **kwargs)
    return cache


def held(cache, row: int, length: int):
    """For every layer and head the places of the tokens kept, counted from the end of the prompt, and their keys."""
    for layer in cache.layers:
        segment = layer.segments[0]
        stored = segment.rows[row]
        positions, runs = segment.positions(), segment.layout.owners
        for head, (key, _) in enumerate(segment.dense()[stored]):
            run = stored * segment.layout.heads + head
            yield sorted((positions[runs == run] - length).tolist()), key


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("triple", TRIPLES, ids="+".join)
def test_a_row_alone_is_the_row_in_a_padded_batch(triple, family):
    sliding = {"layer_types": ["full_attention"] * 4} if family == "gemma3_text" else {}
    model = patch_model(tiny_model(family, **sliding), methods_of(triple, budget=18))
    rows = [random_ids(length=length, seed=length)[0] for length in (40, 27, 16)]
    ids, mask = left_pad(rows)
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    together = prefilled(model, ids, attention_mask=mask, position_ids=position_ids)
    for row, own in enumerate(rows):
        alone = prefilled(model, own[None])
        for (places, key), (expected, expected_key) in zip(
            held(together, row, 40), held(alone, 0, len(own)), strict=True
        ):
            assert places == expected and min(places) >= -len(own)
            torch.testing.assert_close(key, expected_key, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("triple", TRIPLES, ids="+".join)
def test_bytes_fall_with_the_budget(triple):
    model = patch_model(tiny_model("llama"), methods_of(triple, budget=0.25))
    ids = random_ids(length=160)
    full = live_bytes(prefilled(patch_model(tiny_model("llama")), ids).layers)
    # an entry of these tiny heads costs 64 bytes and 4 for its place
    assert live_bytes(prefilled(model, ids).layers) <= 0.25 * full * 68 / 64 + 4096


def decode(model, cache, ids, steps):
    """Greedy steps through plain forwards; returns the logits of all of them."""
    found = []
    with torch.no_grad():
        for _ in range(steps):
            logits = model(ids, past_key_values=cache).logits[:, -1:]
            ids = logits.argmax(-1)
            found.append(logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("scorer", DECODING)
@pytest.mark.parametrize(
    "others", [("uniform", "top-k"), ("adakv", "criticalkv"), ("pyramidkv", "top-k")], ids="+".join
)
def test_memory_is_bounded_while_decoding(scorer, others):
    budget, every = 20, 8
    model = patch_model(tiny_model("llama"), methods_of((scorer, *others), budget=budget, every=every))
    cache = prefilled(model, random_ids(batch=2, length=30))
    for step in range(60):
        with torch.no_grad():
            model(torch.full((2, 1), 3 + step % 7), past_key_values=cache)
        entries = [torch.tensor(layer.segments[0].lengths).sum(-1) + layer.tail.length * 2 for layer in cache.layers]
        assert bool((torch.stack(entries).sum(0) <= (budget + every) * 2 * 4).all())
        assert all(len(layer.segments) == 1 and layer.tail.length < every for layer in cache.layers)
    assert cache.get_seq_length() == 90
    assert all(q.shape[2] <= 90 for layer in cache.layers for q in layer.evictor.queries.values())


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


def test_headkv_and_adakv_cannot_both_allocate():
    with pytest.raises(ValueError, match="'adakv' sets the slot 'allocator', but 'headkv' already did"):
        patch_model(tiny_model("llama"), [build("headkv"), AdaKV()])
    assert isinstance(build("headkv"), HeadKV)
