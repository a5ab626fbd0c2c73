"""`compress`: a context is read once, in parts or in one go, and asked many questions on copies that share it."""

import copy

import pytest
import torch

from hf_kvcache import KVzip, compress, load_cache, new_cache, patch_model, report
from hf_kvcache.measure import cache_bytes
from hf_kvcache.report import kept_positions, storage_bytes
from hf_kvcache.testing import greedy, left_pad, random_ids, tiny_model

INSTRUCTIONS = ((5, 6, 7), (8, 9))
METHODS = {
    "snapkv": ["snapkv"],
    "adakv+criticalkv": ["snapkv", "adakv", "criticalkv"],
    "kvzip": [KVzip(instructions=INSTRUCTIONS, chunk=16, budget=0.5)],
    "kvzip+adakv": [KVzip(instructions=INSTRUCTIONS, chunk=16), "adakv"],
    "kvzip+criticalkv": [KVzip(instructions=INSTRUCTIONS, chunk=16), "criticalkv"],
}
every_method = pytest.mark.parametrize("method", METHODS)


def patched(family: str, method: str):
    parts = METHODS[method]
    named = [part for part in parts if isinstance(part, str)]
    options = {"budget": 0.5} if named else {}
    if "snapkv" in named:
        options["window"] = 4
    return patch_model(tiny_model(family), parts, **options)


@every_method
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_reading_in_parts_is_reading_at_once(family, method):
    model, ids = patched(family, method), random_ids(batch=2, length=40)
    whole, parts = compress(model, ids), compress(model, ids, chunk=7)
    assert report(whole).layers[-1].stored == report(parts).layers[-1].stored
    full = torch.cat([ids, random_ids(batch=2, length=5, seed=9)], dim=1)
    assert torch.equal(greedy(model, full, past_key_values=whole), greedy(model, full, past_key_values=parts))


@every_method
def test_a_padded_row_is_compressed_as_if_alone(method):
    model = patched("gemma2", method)
    rows = [random_ids(length=40, seed=3)[0], random_ids(length=31, seed=4)[0]]
    ids, mask = left_pad(rows)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, own in enumerate(rows):
        alone = model.generate(own[None], max_new_tokens=8, do_sample=False)
        assert torch.equal(together[row, -8:], alone[0, -8:])


@every_method
def test_ten_questions_do_not_hold_ten_caches(method):
    model, ids = patched("llama", method), random_ids(length=200)
    cache = compress(model, ids)
    held = cache_bytes(cache)
    copies = []
    for seed in range(10):
        copied = copy.deepcopy(cache)
        greedy(model, torch.cat([ids, random_ids(length=4, seed=seed)], dim=1), tokens=2, past_key_values=copied)
        copies.append(copied)
    together = storage_bytes(t for c in [cache, *copies] for layer in c.layers for t in layer.tensors())
    assert held < 0.6 * report(cache).full_bytes
    assert together < held + 0.2 * 10 * held
    assert cache.get_seq_length() == 200


@every_method
def test_a_question_is_not_evicted(method):
    model, ids = patched("llama", method), random_ids(length=60)
    cache = compress(model, ids)
    kept = sum(map(sum, (layer.stored for layer in report(cache).layers)))
    with torch.no_grad():
        model(random_ids(length=30, seed=5), past_key_values=cache)
    after = sum(map(sum, (layer.stored for layer in report(cache).layers)))
    assert after == kept + 30 * 2 * 4


@every_method
def test_a_compressed_cache_is_saved_and_loaded(method, tmp_path):
    model, ids = patched("llama", method), random_ids(length=60)
    cache = compress(model, ids)
    cache.save(tmp_path / "context.safetensors")
    loaded = load_cache(model, tmp_path / "context.safetensors")
    assert cache_bytes(loaded) == cache_bytes(cache)
    full = torch.cat([ids, random_ids(length=5, seed=9)], dim=1)
    assert torch.equal(greedy(model, full, past_key_values=cache), greedy(model, full, past_key_values=loaded))


def test_reading_again_leaves_nothing_behind():
    """Neither tokens in the cache nor a model in its memory."""
    model, ids = patched("gemma2", "kvzip"), random_ids(length=40)
    cache = compress(model, ids)
    assert cache.get_seq_length() == 40 and cache.prompt_ids is cache.prompt_positions is None and not cache.pending
    for layer in cache.layers:
        assert layer.seen == 40
        assert not any(isinstance(value, torch.nn.Module) for value in vars(layer).values())


@torch.no_grad()
@pytest.mark.parametrize("in_parts", [False, True], ids=["at once", "in parts"])
@pytest.mark.parametrize("told", [False, True], ids=["counting columns", "position_ids"])
def test_a_padded_row_is_repeated_behind_where_it_ends(told, in_parts):
    model = patched("llama", "kvzip")
    rows = [random_ids(length=length, seed=length)[0] for length in (60, 30)]
    ids, mask = left_pad(rows)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together, alone = new_cache(model), compress(model, rows[1][None])
    together.expect(60)
    for start, end in [(0, 40), (40, 60)] if in_parts else [(0, 60)]:
        places = {"position_ids": positions[:, start:end]} if told else {}
        model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=together, **places)
    for layer, own in zip(kept_positions(together, row=1), kept_positions(alone), strict=True):
        assert [(head - 30).tolist() for head in layer] == [head.tolist() for head in own]


@pytest.mark.parametrize("ids", [torch.zeros(1, 0, dtype=torch.long), torch.zeros(4, dtype=torch.long)], ids=str)
def test_what_is_not_a_context_is_refused(ids):
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        compress(patched("llama", "snapkv"), ids)


@pytest.mark.parametrize("first", ["embeddings", "ids"])
def test_embeddings_cannot_be_read_again(first):
    model = patched("llama", "kvzip")
    with pytest.raises(NotImplementedError, match="token ids"):
        model(inputs_embeds=torch.randn(1, 40, 48))
    parts = {"ids": {"input_ids": random_ids(length=20)}, "embeddings": {"inputs_embeds": torch.randn(1, 20, 48)}}
    cache = new_cache(model)
    cache.expect(40)
    model(**parts.pop(first), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="token ids"):
        model(**parts.popitem()[1], past_key_values=cache)


def cropped(model, cache, ids, path):
    model(random_ids(batch=2, length=10, seed=3), past_key_values=cache)
    cache.crop(-10)
    return cache, ids


def reordered(model, cache, ids, path):
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache, ids.flip(0)


def saved(model, cache, ids, path):
    cache.save(path)
    return load_cache(model, path), ids


def emptied_after_an_error(model, cache, ids, path):
    def stop(*_):
        raise RuntimeError("stopped")

    hook = model.model.layers[2].register_forward_pre_hook(stop)
    cache = new_cache(model)
    cache.expect(40)
    with pytest.raises(RuntimeError, match="stopped"):
        model(random_ids(batch=2, length=30, seed=3), past_key_values=cache)
    hook.remove()
    cache.crop(-cache.get_seq_length())
    model(ids[:, :20], past_key_values=cache)
    return cache, ids


@torch.no_grad()
@pytest.mark.parametrize("change", [cropped, reordered, saved, emptied_after_an_error])
def test_the_prompt_that_is_held_is_read_again(change, tmp_path):
    """Not one that was cropped, or of another row, since."""
    model, ids = patched("llama", "kvzip"), random_ids(batch=2, length=40)
    cache = new_cache(model)
    cache.expect(40)
    model(ids[:, :20], past_key_values=cache)
    cache, ids = change(model, cache, ids, tmp_path / "cache.safetensors")
    model(ids[:, 20:], past_key_values=cache)
    whole = compress(model, ids)
    for row in range(2):
        for layer, expected in zip(kept_positions(cache, row), kept_positions(whole, row), strict=True):
            assert [head.tolist() for head in layer] == [head.tolist() for head in expected]
