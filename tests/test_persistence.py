"""A cache saved as safetensors and read back goes on as if it had never left memory (law 15); bad files raise."""

import pytest
import torch

from hf_kvcache import (
    H2O,
    TOVA,
    Fp8,
    KVSharer,
    Offload,
    SharingPlan,
    SnapKV,
    StreamingLLM,
    TurboQuant,
    load_cache,
    new_cache,
    patch_model,
)
from hf_kvcache.measure import cache_bytes
from hf_kvcache.testing import random_ids, tiny_model

METHODS = {
    "none": None,
    "offload": Offload(),
    "kvsharer": KVSharer(plan=SharingPlan.from_pairs(4, [(3, 1)])),
}


def filled_cache(model, ids):
    """A cache with a sealed prompt and a tail."""
    cache = new_cache(model)
    with torch.no_grad():
        model(ids[:, :-3], past_key_values=cache)
        model(ids[:, -3:], past_key_values=cache)
    return cache


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi3"])
def test_loaded_cache_continues_as_the_saved_one(family, method, tmp_path):
    model = patch_model(tiny_model(family), METHODS[method])
    ids = random_ids(batch=2, length=24)
    cache = filled_cache(model, ids)
    cache.save(tmp_path / "cache.safetensors")
    loaded = load_cache(model, tmp_path / "cache.safetensors")
    assert loaded.get_seq_length() == cache.get_seq_length() == 24
    token = torch.tensor([[5], [6]])
    with torch.no_grad():
        for _ in range(6):
            expected = model(token, past_key_values=cache).logits
            actual = model(token, past_key_values=loaded).logits
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            token = expected[:, -1:].argmax(-1)


def test_left_padding_survives(tmp_path):
    model = patch_model(tiny_model("llama"))
    ids, mask = random_ids(batch=2, length=20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    cache = new_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = load_cache(model, tmp_path / "cache.safetensors")
    assert loaded.layers[0].segments[0].lengths == ((14,) * 2, (20,) * 2)
    assert cache_bytes(loaded) == cache_bytes(cache)


def test_empty_cache_round_trips(tmp_path):
    model = patch_model(tiny_model("llama"))
    new_cache(model).save(tmp_path / "cache.safetensors")
    assert load_cache(model, tmp_path / "cache.safetensors").get_seq_length() == 0


def test_cache_of_another_model_is_refused(tmp_path):
    model, other = patch_model(tiny_model("llama")), patch_model(tiny_model("llama", seed=1))
    filled_cache(model, random_ids()).save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match=r"is a cache of the model .* this one is"):
        load_cache(other, tmp_path / "cache.safetensors")


def test_cache_of_another_plan_is_refused(tmp_path):
    model = patch_model(tiny_model("llama"), METHODS["kvsharer"])
    filled_cache(model, random_ids()).save(tmp_path / "cache.safetensors")
    patch_model(model)
    with pytest.raises(ValueError, match=r"source_layers .* patch it with the same plan"):
        load_cache(model, tmp_path / "cache.safetensors")


def test_truncated_foreign_and_missing_files_are_refused(tmp_path):
    model = patch_model(tiny_model("llama"))
    path = tmp_path / "cache.safetensors"
    filled_cache(model, random_ids()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_cache(model, path)
    SharingPlan.identity(4).save(path)
    with pytest.raises(ValueError, match=r"format 'hf_kvcache\.sharing_plan/1', expected 'hf_kvcache\.cache/1'"):
        load_cache(model, path)
    with pytest.raises(FileNotFoundError, match=r"make one with KVCache\.save"):
        load_cache(model, tmp_path / "absent.safetensors")


def test_unpatched_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not patched"):
        load_cache(tiny_model("llama"), tmp_path / "cache.safetensors")


CODECS = {
    "another seed": (TurboQuant(bits=8, block_size=8), TurboQuant(bits=8, block_size=8, seed=1)),
    "other bits": (TurboQuant(bits=8, block_size=8), TurboQuant(bits=4, block_size=8)),
    "another codec": (Fp8(block_size=8), TurboQuant(bits=8, block_size=8)),
    "none before": (None, TurboQuant(bits=8, block_size=8)),
    "none after": (TurboQuant(bits=8, block_size=8), None),
}


@pytest.mark.parametrize("case", CODECS)
def test_a_cache_goes_on_under_another_codec(case, tmp_path):
    saved, own = CODECS[case]
    ids, later = random_ids(length=40), random_ids(length=20, seed=1)
    model = tiny_model("llama", head_dim=16)
    with torch.no_grad():
        expected = model(torch.cat([ids, later], dim=1)).logits[:, 40:].log_softmax(-1)
        patch_model(model, saved)
        model(ids, use_cache=True).past_key_values.save(tmp_path / "cache.safetensors")
        patch_model(model, own)
        cache = load_cache(model, tmp_path / "cache.safetensors")
        actual = torch.cat([model(token, past_key_values=cache).logits for token in later.split(1, dim=1)], dim=1)
    divergence = (expected.exp() * (expected - actual.log_softmax(-1))).sum(-1)
    # codes read by another rotation give ten times as much
    assert divergence[0, -8:].mean() < 0.2


def test_a_cache_of_another_codec_is_refused_where_eviction_goes_on(tmp_path):
    model = patch_model(tiny_model("llama"), TurboQuant())
    filled_cache(model, random_ids(length=40)).save(tmp_path / "cache.safetensors")
    patch_model(model, StreamingLLM(budget=16, every=4))
    with pytest.raises(ValueError, match=r"codec TurboQuantCodec\(.* has DenseCodec\(.*patch it with the method"):
        load_cache(model, tmp_path / "cache.safetensors")


@pytest.mark.parametrize("saved", [None, H2O(budget=0.5), TOVA(budget=0.5, every=4)])
def test_a_cache_without_what_eviction_remembers_is_refused(saved, tmp_path):
    model = patch_model(tiny_model("llama"), saved)
    filled_cache(model, random_ids(length=40)).save(tmp_path / "cache.safetensors")
    patch_model(model, H2O(budget=0.5, every=4))
    with pytest.raises(ValueError, match=r"without attention_received.*patch it with the method that made it"):
        load_cache(model, tmp_path / "cache.safetensors")


@pytest.mark.parametrize("own", [None, TOVA(budget=0.5, every=4), SnapKV(budget=0.5, every=4, window=4)])
def test_what_another_eviction_remembered_is_left_behind(own, tmp_path):
    model = patch_model(tiny_model("llama"), H2O(budget=0.5, every=4))
    filled_cache(model, random_ids(length=40)).save(tmp_path / "cache.safetensors")
    patch_model(model, own)
    cache = load_cache(model, tmp_path / "cache.safetensors")
    with torch.no_grad():
        for token in random_ids(length=12, seed=1).split(1, dim=1):
            assert model(token, past_key_values=cache).logits.isfinite().all()
    assert "attention_received" not in cache.layers[0].segments[0].held
