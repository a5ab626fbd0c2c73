"""Law 11: reported bytes are those of the live storages, and they fall as promised."""

import pytest
import torch

from hf_kvcache import new_cache, report
from hf_kvcache.measure import cache_bytes
from hf_kvcache.testing import left_pad, live_bytes, random_ids
from tests.contract.matrix import every_family, every_method, original, patched, whole_matrix
from tests.forward import logits


@whole_matrix
def test_reported_bytes_are_the_live_storages(family, method):
    model = patched(family, method)
    cache = new_cache(model)
    for ids in (random_ids(batch=2, length=23), random_ids(batch=2, length=1), random_ids(batch=2, length=40)):
        logits(model, ids, past_key_values=cache)
        assert report(cache).bytes == live_bytes(cache) > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "phi3"])
@every_method
def test_bytes_fall_with_the_share_of_consumers(family, method):
    ids = random_ids(batch=2, length=50)
    model = patched(family, method)
    with torch.no_grad():
        cache = model(ids).past_key_values
        full = live_bytes(original(family)(ids).past_key_values)
    layers, consumers = model.config.num_hidden_layers, len(cache.spec.sharing.consumers)
    assert full == 2 * layers * 2 * 2 * 50 * 8 * 4  # K and V, layers, rows, KV heads, tokens, head dimension, float32
    assert live_bytes(cache) == (1 - consumers / layers) * full
    assert report(cache).full_bytes == full
    assert report(cache).ratio == pytest.approx(layers / (layers - consumers))


@every_family
def test_consumers_hold_nothing(family):
    model = patched(family, "several")
    with torch.no_grad():
        cache = model(random_ids(length=30)).past_key_values
    for layer, measured in zip(cache.layers, report(cache).layers, strict=True):
        assert (measured.bytes == 0) == (measured.source != measured.layer)
        assert bool(layer.tensors()) == (measured.source == measured.layer)


def test_padding_is_not_kept():
    model = patched("llama", "none")
    ids, mask = left_pad([random_ids(length=length)[0] for length in (40, 10)])
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
    position = 4
    assert cache_bytes(cache) == 4 * 2 * (40 + 10) * (2 * 8 * 4 + position)


def test_a_window_does_not_keep_the_prompt_alive():
    model = patched("mistral", "none")
    with torch.no_grad():
        short, long = (model(random_ids(length=length)).past_key_values for length in (20, 200))
    assert live_bytes(short) == live_bytes(long)
