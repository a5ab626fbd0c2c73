"""Greedy decoding, sampling and beams give what they give without the cache, and hold a prompt once."""

import pytest
import torch

from hf_kvcache import TurboQuant, new_cache, patch_model
from hf_kvcache.testing import greedy, live_bytes, random_ids, tiny_model
from tests.generate.models import FULL, every_family, every_method, original, padded_batch, patched, uncached


@every_family
@every_method
def test_greedy_of_a_padded_batch_is_without_a_cache(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    assert torch.equal(greedy(model, ids, tokens=12, attention_mask=mask), uncached(model, ids, mask=mask))


@every_family
@every_method
def test_sampling_with_a_seed_repeats_itself(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()

    def sample(some_model):
        torch.manual_seed(5)
        return greedy(some_model, ids, attention_mask=mask, do_sample=True, temperature=0.8, top_k=20)

    assert torch.equal(sample(model), sample(model))
    if method == "none":
        assert torch.equal(sample(model), sample(original(family)))


@every_family
@every_method
def test_returned_sequences_are_samples_of_one_prompt(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()

    def sample(rows, row_mask, **kwargs):
        torch.manual_seed(5)
        return greedy(model, rows, attention_mask=row_mask, do_sample=True, **kwargs)

    actual = sample(ids, mask, num_return_sequences=3)
    assert torch.equal(actual, sample(ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)))
    assert len(actual.unique(dim=0)) > 2
    if method == "none":
        torch.manual_seed(5)
        expected = greedy(original(family), ids, attention_mask=mask, do_sample=True, num_return_sequences=3)
        assert torch.equal(actual, expected)


@every_family
@pytest.mark.parametrize("padded", [False, True], ids=["one-length", "left-padded"])
def test_beam_search_is_the_unpatched_one(family, padded):
    ids, mask = padded_batch() if padded else (random_ids(batch=2, length=13), None)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 2}
    assert torch.equal(greedy(patched(family, "none"), ids, **options), greedy(original(family), ids, **options))


@every_family
def test_beam_search_on_shared_layers_is_without_a_cache(family):
    model = patched(family, "shared")
    ids, mask = padded_batch()
    options = {"tokens": 8, "attention_mask": mask, "num_beams": 3, "num_return_sequences": 3}
    assert torch.equal(greedy(model, ids, **options), greedy(model, ids, use_cache=False, **options))


@every_family
@every_method
def test_beams_with_a_chunked_prefill(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    options = {"tokens": 6, "attention_mask": mask, "num_beams": 3}
    assert torch.equal(greedy(model, ids, prefill_chunk_size=5, **options), greedy(model, ids, **options))


@pytest.mark.parametrize("family", FULL)
@every_method
def test_beam_sampling_runs(family, method):
    model = patched(family, method)
    ids, mask = padded_batch()
    torch.manual_seed(1)
    out = greedy(model, ids, attention_mask=mask, num_beams=3, do_sample=True)
    assert out.shape == (2, 12)


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize(("beams", "sequences"), [(4, 1), (4, 4), (1, 5)])
def test_a_prompt_is_held_once_for_all_beams(family, beams, sequences):
    model = patched(family, "none")
    ids = random_ids(batch=2, length=200)
    cache = new_cache(model)
    greedy(
        model,
        ids,
        tokens=3,
        num_beams=beams,
        num_return_sequences=sequences,
        do_sample=beams == 1,
        past_key_values=cache,
    )
    copies = max(beams, sequences)
    assert cache.batch_size == 2 * copies
    one_prompt = 4 * 2 * 2 * 8 * 4 * 200  # layers, K and V, KV heads, head dimension, float32, tokens
    tail = sum(live_bytes(layer.tail) for layer in cache.layers)
    assert live_bytes(cache) - tail == 2 * one_prompt
    assert tail < 2 * one_prompt


def test_beams_do_not_pile_up_segments_nor_rows_that_none_of_them_reads():
    model = patch_model(tiny_model("llama"), TurboQuant(bits=8, residual_length=8, block_size=16))
    ids, beams = random_ids(length=20), 3
    with torch.no_grad():
        cache = new_cache(model)
        cache.expect(20, copies=beams)
        model(ids.repeat(beams, 1), past_key_values=cache)
        texts = ids.repeat(beams, 1)
        for step in range(100):
            rows = torch.tensor([[0, 0, 1], [2, 1, 0], [1, 2, 2]][step % 3])
            cache.reorder_cache(rows)
            new = random_ids(batch=beams, length=1, seed=step)
            texts = torch.cat([texts[rows], new], dim=1)
            model(new, past_key_values=cache)
    for layer in cache.layers:
        prompt, generated = layer.segments
        assert len(prompt.lengths) == 1 and len(generated.lengths) == beams
        assert prompt.seen + generated.seen + layer.tail.length == 120
    # what is read is the text that each beam has become
    new = random_ids(batch=beams, length=1, seed=200)
    with torch.no_grad():
        found = model(new, past_key_values=cache).logits[:, -1]
        exact = model(torch.cat([texts, new], dim=1), use_cache=False).logits[:, -1]
    assert float((found - exact).square().mean() / exact.square().mean()) < 1e-3
