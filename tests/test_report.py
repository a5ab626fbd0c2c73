"""`report` counts the bytes of live storages, per layer, and knows what a full cache would hold."""

import pytest
import torch
from transformers import DynamicCache

from hf_kvcache import KVSharer, SharingPlan, patch_model, report, unpatch_model
from hf_kvcache.measure import cache_bytes
from hf_kvcache.testing import live_bytes, random_ids, tiny_model


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3", "phi3"])
@pytest.mark.parametrize("pairs", [(), [(3, 1)]], ids=["none", "shared"])
def test_bytes_are_those_of_live_storages(family, pairs):
    model = tiny_model(family)
    ids = random_ids(batch=2, length=30)
    with torch.no_grad():
        full = model(ids, use_cache=True).past_key_values
        patch_model(model, KVSharer(plan=SharingPlan.from_pairs(4, pairs)))
        cache = model(ids, use_cache=True).past_key_values
    measured = report(cache)
    assert measured.bytes == live_bytes(cache) == cache_bytes(cache)
    tokens = sum(layer.keys.shape[2] for layer in full.layers)
    entry = full.layers[0].keys[:, :, :1].nbytes * 2
    assert measured.full_bytes == tokens * entry
    assert measured.ratio == measured.full_bytes / measured.bytes
    for layer, source in zip(measured.layers, cache.spec.sharing.source_layers, strict=True):
        assert (layer.bytes == 0) == (layer.source != layer.layer) and layer.source == source
        assert layer.seen == 30


def test_kept_tokens_are_counted_per_head():
    model = patch_model(tiny_model("llama"))
    ids, mask = random_ids(batch=2, length=20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    assert report(cache).layers[0].stored == (17.0, 17.0)


def test_text_and_empty_cache():
    model = patch_model(tiny_model("llama"))
    with torch.no_grad():
        cache = model(random_ids(), use_cache=True).past_key_values
    text = str(report(cache))
    assert text.count("\n") == 5 and "ratio 1.00" in text
    cache.reset()
    assert report(cache).bytes == 0 and report(cache).ratio == 1.0


def test_foreign_cache_is_refused():
    with pytest.raises(TypeError, match="takes the KVCache of a patched model, got a DynamicCache"):
        report(DynamicCache())
    unpatch_model(tiny_model("llama"))


def test_a_shell_around_tensors_is_counted_by_what_it_holds():
    from torch.testing._internal.two_tensor import TwoTensor

    parts = torch.zeros(3, 4), torch.ones(3, 4)
    assert live_bytes({"quantised": TwoTensor(*parts)}) == sum(part.nbytes for part in parts)
