"""The early exit of the original YOCO is exact: upper layers run for a few positions, lower ones part by part."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from hf_kvcache import patch_model, unpatch_model
from hf_kvcache.testing import greedy, left_pad, live_bytes, random_ids
from tests.forward import close, logits
from tests.models.yoco import every_kind, model_of, patched_or_not


@pytest.fixture
def positions():
    """Counts the positions that modules process."""
    seen = {}

    def count(module):
        seen[module] = 0
        module.register_forward_hook(
            lambda module, args, output: seen.__setitem__(module, seen[module] + output.shape[1])
        )

    return seen, count


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none", "turboquant"])
def test_early_exit_is_exact_and_skips_the_upper_layers(kind, method, positions):
    seen, count = positions
    model = patched_or_not(kind, method)
    ids, mask = left_pad([random_ids(length=length)[0] for length in (21, 9)])
    below = model.config.num_self_decoder_layers
    for layer in model.model.layers:
        count(layer.mlp)
    exact = logits(model, ids, attention_mask=mask, logits_to_keep=1)
    ran = [seen[layer.mlp] for layer in model.model.layers]
    assert ran == [21] * below + [1] * (len(ran) - below)
    model.config.early_exit = False
    close(logits(model, ids, attention_mask=mask, logits_to_keep=1), exact)
    assert [seen[layer.mlp] for layer in model.model.layers] == [42] * below + [22] * (len(ran) - below)
    model.config.early_exit = True
    assert logits(model, ids, attention_mask=mask).shape[1] == 21


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none", "turboquant", "snapkv"])
@pytest.mark.parametrize("size", [5, 7, 16, 20])
def test_a_prompt_may_be_read_in_parts(kind, method, size):
    model = patched_or_not(kind, method)
    if method == "snapkv":
        # looks at as many of the last queries, which run through the upper layers too
        patch_model(unpatch_model(model), method, window=4, budget=0.5)
    ids, mask = left_pad([random_ids(length=length)[0] for length in (33, 21)])
    for asked in ({}, {"attention_mask": mask}):
        model.config.self_decoder_chunk_size = None
        whole = model(ids, logits_to_keep=1, **asked)
        tokens = greedy(model, ids, **asked)
        model.config.self_decoder_chunk_size = size
        with torch.no_grad():
            parts = model(ids, logits_to_keep=1, **asked)
        close(parts.logits, whole.logits.detach())
        assert live_bytes(parts.past_key_values) <= live_bytes(whole.past_key_values)
        assert torch.equal(greedy(model, ids, **asked), tokens)
    # the largest part that a layer was given
    largest: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: largest.append(output.shape[1]))
    logits(model, ids, logits_to_keep=1)
    assert max(largest) == size and sum(largest) == 33
    # what is wanted of more positions than a part has comes from one part
    largest.clear()
    close(logits(model, ids, logits_to_keep=22), logits(model, ids)[:, -22:])
    assert largest == [33, 33]


@every_kind
def test_generated_tokens_do_not_depend_on_early_exit(kind):
    model, ids = model_of(kind), random_ids(batch=2, length=17)
    expected = greedy(model, ids)
    model.config.early_exit = False
    assert torch.equal(greedy(model, ids), expected)
    patch_model(model, "snapkv", budget=12, window=4)
    expected = greedy(model, ids)
    model.config.early_exit = True
    # snapkv looks at the last queries of every reader, so the upper layers run for these
    assert torch.equal(greedy(model, ids), expected)


class LargestMask(TorchDispatchMode):
    """Keeps the number of elements of the largest boolean tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype == torch.bool:
            self.size = max(self.size, found.numel())
        return found


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
def test_early_exit_makes_no_mask_of_the_whole_prompt(kind, attention, rows):
    model = model_of(kind, self_decoder_chunk_size=16)
    model.set_attn_implementation(attention)
    ids, mask = left_pad([random_ids(length=length)[0] for length in (200, 130)])
    whole = logits(model, ids, attention_mask=mask)
    with LargestMask() as largest:
        found = logits(model, ids, attention_mask=mask, logits_to_keep=rows)
    close(found, whole[:, -rows:])
    # a part of 16 tokens and a window before it, or some rows over all tokens
    assert largest.size <= 2 * 16 * 200


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_early_exit_after_earlier_tokens_and_padding(kind, attention, rows, use_cache):
    model = model_of(kind)
    model.set_attn_implementation(attention)
    for ids, mask in (
        left_pad([random_ids(length=length)[0] for length in (30, 19)]),
        (random_ids(batch=2, length=30), torch.ones(2, 30)),
    ):
        whole = logits(model, ids, attention_mask=mask)[:, -rows:]
        start = 14 if use_cache else 0
        past = model(ids[:, :start], attention_mask=mask[:, :start]).past_key_values if use_cache else None
        rest = {"attention_mask": mask, "past_key_values": past, "use_cache": use_cache}
        close(logits(model, ids[:, start:], logits_to_keep=rows, **rest), whole)


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [None, 5])
def test_early_exit_passes_over_the_empty_places_of_a_static_cache(kind, attention, size):
    model = model_of(kind, self_decoder_chunk_size=size)
    model.set_attn_implementation(attention)
    for lengths in ((6, 6), (21, 21), (21, 9)):
        ids, mask = left_pad([random_ids(length=length, seed=length)[0] for length in lengths])
        for start in (0, 4):
            for rows in (1, 2):
                cache = StaticCache(config=model.config, max_cache_len=40)
                if start:
                    logits(model, ids[:, :start], attention_mask=mask[:, :start], past_key_values=cache)
                rest = {"attention_mask": mask, "past_key_values": cache, "logits_to_keep": rows}
                expected = logits(model, ids, attention_mask=mask, use_cache=False)[:, -rows:]
                close(logits(model, ids[:, start:], **rest), expected)
        expected = greedy(model, ids, attention_mask=mask)
        assert torch.equal(greedy(model, ids, attention_mask=mask, cache_implementation="static"), expected)


@every_kind
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_with_masks_of_padding_alone(kind, rows):
    """Flash takes no other mask than that, or none; here SDPA stands for it."""
    given = []

    def attend(module, query, key, value, mask, **kwargs):
        given.append(None if mask is None else mask.shape)
        assert mask is None or mask.shape == (len(key), key.shape[2])
        place = torch.arange(key.shape[2])
        seen = place[None] <= place[-query.shape[2] :, None]
        if kwargs.get("sliding_window"):
            seen = seen & (place[None] > place[-query.shape[2] :, None] - kwargs["sliding_window"])
        seen = seen[None, None] if mask is None else seen[None, None] & mask[:, None, None].bool()
        kwargs.pop("sliding_window", None)
        return sdpa_attention_forward(module, query, key, value, seen, **kwargs)

    AttentionInterface.register("padding_only", attend)
    AttentionMaskInterface.register("padding_only", flash_attention_mask)
    model, ids = model_of(kind), random_ids(batch=2, length=21)
    padded, mask = left_pad([random_ids(length=length)[0] for length in (21, 9)])
    expected = [
        logits(model, ids, logits_to_keep=rows),
        logits(model, padded, attention_mask=mask, logits_to_keep=rows),
    ]
    model.set_attn_implementation("padding_only")
    close(logits(model, ids, logits_to_keep=rows), expected[0])
    assert set(given) == {None}
    close(logits(model, padded, attention_mask=mask, logits_to_keep=rows), expected[1])
    assert set(given) == {None, (2, 21)}


def test_what_is_inside_is_of_all_positions():
    model, ids = model_of("window", self_decoder_chunk_size=4), random_ids(length=9)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, logits_to_keep=1, output_hidden_states=True, output_attentions=True)
    assert [hidden.shape[1] for hidden in found.hidden_states] == [9] * (len(model.model.layers) + 1)
    assert [weights.shape[2] for weights in found.attentions] == [9] * len(model.model.layers)
