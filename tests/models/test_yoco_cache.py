"""The cache of the original YOCO has the paper's bytes, and methods apply to the KV that its upper layers share."""

import copy

import pytest
import torch

from hf_kvcache import KVSharer, SharingPlan, Yoco, new_cache, patch_model, report
from hf_kvcache.models import YocoConfig
from hf_kvcache.testing import greedy, greedy_by_forward, left_pad, live_bytes, random_ids
from tests.forward import logits
from tests.models.yoco import every_kind, model_of, patched_or_not

SIZES = [(4, None, 2), (6, 2, 6), (6, 4, 1), (2, None, 3)]


@every_kind
@pytest.mark.parametrize(("layers", "below", "kv_heads"), SIZES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_bytes_are_the_papers_arithmetic(kind, layers, below, kv_heads, tokens):
    model = model_of(kind, num_hidden_layers=layers, num_self_decoder_layers=below, num_key_value_heads=kv_heads)
    below = below or layers // 2
    patch_model(model, None)
    cache = new_cache(model)
    logits(model, random_ids(batch=3, length=tokens), past_key_values=cache)
    heads, dim, size = 6, 8, 4
    per_token = 2 * kv_heads * dim * size
    # a window of C holds the C - 1 tokens that the next one can see beside itself, one fewer than the paper's buffer
    state = heads * dim**2 * size if kind == "retention" else 2 * heads * dim * size * min(tokens, 8 - 1)
    assert live_bytes(cache) == report(cache).bytes == 3 * (tokens * per_token + below * state)


def test_the_3b_model_has_the_published_bytes():
    config = YocoConfig()
    assert config.kv_bytes_per_token == 4096
    assert 26 * config.kv_bytes_per_token == 106_496
    # states are sums over all tokens, and held in float32
    assert config.state_bytes == 13 * 24 * 128**2 * 4


@pytest.mark.parametrize(("kind", "method"), [("retention", "unpatched"), ("retention", "none"), ("window", "none")])
def test_bytes_in_16_bit_are_those_of_the_configuration(kind, method):
    model = patched_or_not(kind, method).bfloat16()
    with torch.no_grad():
        cache = model(random_ids(batch=1, length=40)).past_key_values
    config = model.config
    # of a window the token that leaves next is gone already
    gone = 0 if kind == "retention" else config.state_bytes // config.sliding_window
    assert live_bytes(cache) == 40 * config.kv_bytes_per_token + config.state_bytes - gone


@every_kind
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("turboquant", {}),
        ("offload", {}),
        ("h2o", {"budget": 10}),
        ("adakv+criticalkv+turboquant", {"budget": 10, "window": 4}),
        ("kvzip", {"budget": 0.5, "instructions": ((3, 4), (5, 6))}),
    ],
)
def test_methods_compose(kind, method, options):
    model = patch_model(model_of(kind), method, **options)
    rows = [random_ids(length=length, seed=length)[0] for length in (23, 18)]
    ids, mask = left_pad(rows)
    batch = greedy(model, ids, attention_mask=mask, tokens=6)
    for index, row in enumerate(rows):
        assert torch.equal(greedy(model, row[None], tokens=6)[0], batch[index])


def test_eviction_takes_bytes_of_the_shared_kv():
    sizes = []
    for method, options in ((None, {}), ("snapkv", {"budget": 0.25, "window": 4})):
        model = patch_model(model_of("retention"), method, **options)
        with torch.no_grad():
            sizes.append(report(model(random_ids(length=40)).past_key_values).layers[2].bytes)
    assert sizes[1] < 0.35 * sizes[0]


@every_kind
def test_saved_cache_continues(kind, tmp_path):
    from hf_kvcache import load_cache

    model, ids = patch_model(model_of(kind), None), random_ids(batch=2, length=15)
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.save(tmp_path / "cache.safetensors")
        again = load_cache(model, tmp_path / "cache.safetensors")
        copied = copy.deepcopy(cache)
    expected = greedy_by_forward(model, ids[:, -1:], cache=cache)
    assert torch.equal(greedy_by_forward(model, ids[:, -1:], cache=again), expected)
    assert torch.equal(greedy_by_forward(model, ids[:, -1:], cache=copied), expected)


def test_what_the_architecture_shares_no_method_shares_again():
    for method in (KVSharer(plan=SharingPlan.identity(4)), Yoco(split=3)):
        with pytest.raises(ValueError, match="the model's own architecture"):
            patch_model(model_of("retention"), method)
