"""The original YOCO as a transformers model: cached decoding is one full pass, patched or not, however it is called."""

import copy

import pytest
import torch

from hf_kvcache import new_cache, patch_model, unpatch_model
from hf_kvcache.testing import greedy, greedy_by_forward, left_pad, model_state, random_ids
from tests.forward import close, logits
from tests.models.yoco import every_kind, model_of, patched_or_not


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none"])
def test_cached_decoding_is_one_full_pass(kind, method):
    model = patched_or_not(kind, method)
    ids = random_ids(batch=2, length=21)
    chosen = greedy(model, ids)
    whole = logits(model, torch.cat([ids, chosen], dim=1), use_cache=False)[:, 20:-1]
    assert torch.equal(whole.argmax(-1), chosen)
    assert torch.equal(greedy_by_forward(model, ids), chosen)


@every_kind
def test_no_method_is_the_unpatched_model(kind):
    model = model_of(kind)
    ids, mask = left_pad([random_ids(length=length)[0] for length in (21, 9, 1)])
    expected, before = greedy(model, ids, attention_mask=mask), model_state(model)
    patch_model(model, None)
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    unpatch_model(model)
    before.assert_equal(model_state(model))


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none"])
def test_padded_row_is_the_row_alone(kind, method):
    model = patched_or_not(kind, method)
    rows = [random_ids(length=length, seed=length)[0] for length in (23, 11, 3)]
    ids, mask = left_pad(rows)
    batch = greedy(model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        assert torch.equal(greedy(model, row[None])[0], batch[index])


@every_kind
@pytest.mark.parametrize("method", ["unpatched", "none"])
@pytest.mark.parametrize("chunk", [1, 7])
def test_prefill_may_come_in_chunks(kind, method, chunk):
    model = patched_or_not(kind, method)
    ids = random_ids(batch=2, length=19)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=chunk), greedy(model, ids))


@every_kind
def test_beams_are_those_of_the_unpatched_model(kind):
    model, ids = model_of(kind), random_ids(batch=2, length=14)
    expected = greedy(model, ids, num_beams=3, num_return_sequences=2)
    assert torch.equal(greedy(patch_model(model, None), ids, num_beams=3, num_return_sequences=2), expected)


@every_kind
def test_eager_is_sdpa(kind):
    model, ids = model_of(kind), random_ids(batch=2, length=21)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    close(logits(other, ids, use_cache=False), logits(model, ids, use_cache=False))
    assert torch.equal(greedy(other, ids), greedy(model, ids))


@pytest.mark.parametrize("method", ["unpatched", "none"])
def test_windows_by_blocks_are_those_of_the_mask(method):
    model = patched_or_not("window", method)
    eager = model_of("window")
    eager.set_attn_implementation("eager")
    for length in (8, 9, 16, 17, 37):
        ids = random_ids(batch=2, length=length)
        for kwargs in ({}, {"use_cache": False}):
            close(logits(model, ids, **kwargs), logits(eager, ids, use_cache=False))
        # a second chunk longer than the window, after a first one
        chunks = greedy(model, ids, tokens=4, prefill_chunk_size=11)
        assert torch.equal(chunks, greedy(eager, ids, tokens=4))


def test_windows_take_drafts_back():
    model, ids = patch_model(model_of("window"), None), random_ids(length=10).repeat(1, 2)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=3), greedy(model, ids))


def test_a_state_cannot_be_rolled_back():
    model, ids = model_of("retention"), random_ids(length=10)
    with pytest.raises(ValueError, match="stateful"):
        greedy(model, ids, prompt_lookup_num_tokens=3)
    cache = new_cache(patch_model(model, None))
    logits(model, ids, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot forget"):
        cache.crop(-2)
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        cache.activate_past_recording()


def test_masks_of_other_shapes_are_refused():
    ids = random_ids(length=6)
    with pytest.raises(NotImplementedError, match="mask of padding"):
        model_of("retention")(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


def test_ids_or_embeddings():
    model, ids = model_of("retention"), random_ids(length=6)
    embedded = model.get_input_embeddings()(ids)
    close(logits(model, None, inputs_embeds=embedded), logits(model, ids))
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embedded)
