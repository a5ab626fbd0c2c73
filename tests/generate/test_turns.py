"""A cache that is passed in continues its text: later turns, copies of one past, sessions side by side."""

import copy

import pytest
import torch

from hf_kvcache import KVCache, new_cache, patch_model
from hf_kvcache.layers import parts
from hf_kvcache.testing import greedy, greedy_by_forward, live_bytes, random_ids, tiny_model
from tests.generate.models import FULL, METHODS, every_family, every_method, padded_batch, patched, uncached


def test_the_cache_of_a_plain_forward_is_ours():
    model = patched("llama", "none")
    ids = random_ids(length=5)
    assert isinstance(model(ids).past_key_values, KVCache)
    assert isinstance(model(ids, use_cache=True).past_key_values, KVCache)
    assert model(ids, use_cache=False).past_key_values is None
    out = model(ids, use_cache=True, return_dict=False)
    assert isinstance(out[1], KVCache)


@every_family
@every_method
def test_a_cache_can_be_passed_in(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    expected = greedy(model, ids, attention_mask=mask)
    cache = new_cache(model)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        past_key_values=cache,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, ids.shape[1] :], expected)
    assert out.past_key_values is cache
    assert cache.get_seq_length() == ids.shape[1] + 11


@every_family
@every_method
@pytest.mark.parametrize("form", ["all-ids", "new-ids"])
def test_second_turn_continues_the_text(family, method, form):
    model = patched(family, method)
    ids, mask = padded_batch()
    cache = new_cache(model)
    first = greedy(model, ids, tokens=7, attention_mask=mask, past_key_values=cache)
    question = random_ids(batch=2, length=5, seed=9)
    text = torch.cat([ids, first, question], dim=1)
    text_mask = torch.cat([mask, torch.ones_like(first), torch.ones_like(question)], dim=1)
    expected = uncached(model, text, tokens=10, mask=text_mask)
    # the last token that was chosen has not been through the model yet
    new = text if form == "all-ids" else text[:, cache.get_seq_length() :]
    second = greedy(model, new, tokens=10, attention_mask=text_mask, past_key_values=cache)
    assert torch.equal(second, expected)
    assert cache.get_seq_length() == text.shape[1] + 9


@every_family
@every_method
def test_a_copied_cache_continues_twice(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=16)
    with torch.no_grad():
        cache = model(ids).past_key_values
        model(random_ids(batch=2, length=3, seed=4), past_key_values=cache)
    text = torch.cat([ids, random_ids(batch=2, length=3, seed=4)], dim=1)
    for seed in (1, 2):
        twin = copy.deepcopy(cache)
        more = torch.cat([text, random_ids(batch=2, length=4, seed=seed)], dim=1)
        assert torch.equal(greedy(model, more, tokens=8, past_key_values=twin), uncached(model, more, tokens=8))
        assert twin.get_seq_length() == 30 and cache.get_seq_length() == 19


@pytest.mark.parametrize("family", FULL)
@every_method
def test_copies_share_what_is_sealed(family, method):
    model = patched(family, method)
    with torch.no_grad():
        cache = model(random_ids(length=300)).past_key_values
        twins = [copy.deepcopy(cache) for _ in range(4)]
        assert live_bytes([cache, *twins]) == live_bytes(cache)
        for seed, twin in enumerate(twins):
            model(random_ids(length=1, seed=seed), past_key_values=twin)
    assert live_bytes([cache, *twins]) < 2 * live_bytes(cache)


@every_family
@every_method
def test_two_sessions_on_one_model(family, method):
    model = patched(family, method)
    prompts = [random_ids(length=length, seed=length) for length in (15, 11)]
    expected = [greedy(model, ids, tokens=8) for ids in prompts]
    caches = [new_cache(model), new_cache(model)]
    texts: list[list[torch.Tensor]] = [[], []]
    feeds = list(prompts)
    for _ in range(8):
        for session in (0, 1):
            feeds[session] = greedy_by_forward(model, feeds[session], tokens=1, cache=caches[session])
            texts[session].append(feeds[session])
    assert [torch.cat(text, dim=1).tolist() for text in texts] == [tokens.tolist() for tokens in expected]


@every_family
def test_two_models_with_different_methods(family):
    ids = random_ids(length=12)
    models = [patched(family, method) for method in METHODS]
    alone = [uncached(model, ids) for model in models]
    for _ in range(2):
        for model, expected in zip(models, alone, strict=True):
            assert torch.equal(greedy(model, ids, tokens=12), expected)


@every_family
@every_method
def test_a_cache_of_inference_mode_can_be_used_outside(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=16)
    with torch.inference_mode():
        cache = model(ids[:, :11]).past_key_values
        model(ids[:, 11:13], past_key_values=cache)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 13:]
        actual = model(ids[:, 13:], past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_family
@every_method
def test_a_cache_made_with_gradients_can_be_copied(family, method):
    model = patched(family, method)
    cache = model(random_ids(batch=2, length=16)).past_key_values
    model(random_ids(batch=2, length=1), past_key_values=cache)
    twin = copy.deepcopy(cache)
    assert twin.get_seq_length() == 17
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.tensors())


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", [None, "turboquant"])
def test_a_long_turn_attends_in_turns(method, padded, monkeypatch):
    """A mask of all its queries, for every head of a group, would be larger than the cache."""
    model = patch_model(tiny_model("qwen2", num_attention_heads=4, num_key_value_heads=1), method)
    ids, mask = random_ids(batch=2, length=320), torch.ones(2, 320, dtype=torch.long)
    mask[1, :9] = int(not padded)
    cache = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
    sizes, attend = [], parts.decode_attention

    def watched(query, key, value, mask, **kwargs):
        sizes.append(mask[0].numel())
        return attend(query, key, value, mask, **kwargs)

    monkeypatch.setattr(parts, "decode_attention", watched)
    logits = []
    for most in (parts.QUERIES_AT_ONCE, 300):
        monkeypatch.setattr(parts, "QUERIES_AT_ONCE", most)
        logits.append(model(ids[:, 20:], attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    layers, group = 4, 4
    assert max(sizes[:-layers]) <= group * 128 * 320 < group * 300 * 300 <= min(sizes[-layers:])
