"""Laws 1, 3 to 5, 9, 10 and 12: what leaves every token as it is: no method, stores, padding, prefill in pieces."""

import pytest
import torch

from hf_kvcache import KVSharer, SharingPlan, new_cache, patch_model
from hf_kvcache.testing import FAMILIES, greedy, greedy_by_forward, left_pad, random_ids
from tests.contract.matrix import every_family, fresh, generate, original, patched, whole_matrix
from tests.forward import close, logits

# law 1: method=None is the unpatched model, token for token


@pytest.mark.parametrize("family", FAMILIES)
def test_no_method_is_the_unpatched_model(family):
    ids = random_ids(batch=2, length=21)
    expected, expected_logits, _ = generate(original(family), ids)
    model = patch_model(fresh(family), method=None)
    actual, actual_logits, _ = generate(model, ids)
    assert torch.equal(actual, expected)
    close(actual_logits, expected_logits)
    close(logits(model, ids), logits(original(family), ids))
    close(logits(model, ids, use_cache=False), logits(original(family), ids))


@every_family
def test_no_method_is_the_unpatched_model_on_padded_rows(family):
    ids, mask = left_pad([random_ids(length=length)[0] for length in (21, 9, 1)])
    expected = greedy(original(family), ids, attention_mask=mask)
    assert torch.equal(greedy(patched(family, "none"), ids, attention_mask=mask), expected)


# law 3: an identity plan shares nothing


@every_family
def test_identity_plan_is_no_sharing(family):
    ids = random_ids(length=17)
    model = fresh(family)
    expected = greedy(model, ids)
    patch_model(model, KVSharer(plan=SharingPlan.identity(model.config.num_hidden_layers)))
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(patch_model(model, "kvsharer", share=0.0), ids), expected)


# laws 4 and 5: where entries rest does not change what is read


@every_family
@pytest.mark.parametrize("method", ["none", "several"])
def test_host_store_is_device_store(family, method):
    ids, mask = left_pad([random_ids(length=length)[0] for length in (21, 8)])
    stored_here, expected, _ = generate(patched(family, method), ids, attention_mask=mask)
    elsewhere = "offload" if method == "none" else f"{method}+offload"
    stored_there, actual, _ = generate(patched(family, elsewhere), ids, attention_mask=mask)
    assert torch.equal(stored_there, stored_here)
    assert torch.equal(actual, expected)


# law 9: a left-padded row is the same row alone


@whole_matrix
def test_padded_row_is_the_row_alone(family, method):
    model = patched(family, method)
    rows = [random_ids(length=length, seed=length)[0] for length in (23, 11, 3)]
    ids, mask = left_pad(rows)
    batch, batch_logits, _ = generate(model, ids, tokens=8, attention_mask=mask)
    for index, row in enumerate(rows):
        alone, alone_logits, _ = generate(model, row[None], tokens=8)
        assert torch.equal(batch[index], alone[0])
        close(batch_logits[index], alone_logits[0])


# law 10: chunked, one-shot and token-by-token prefill agree


@whole_matrix
def test_prefill_may_come_in_pieces(family, method):
    model = patched(family, method)
    ids, mask = left_pad([random_ids(length=length, seed=length)[0] for length in (19, 12)])
    expected, expected_logits, cache = generate(model, ids, tokens=8, attention_mask=mask)
    for chunk in (1, 8):
        actual, actual_logits, chunked = generate(model, ids, tokens=8, attention_mask=mask, prefill_chunk_size=chunk)
        assert torch.equal(actual, expected), f"chunks of {chunk}"
        close(actual_logits, expected_logits)
        assert [layer.seen for layer in chunked.layers] == [layer.seen for layer in cache.layers]
        sealed = [sum(segment.seen for segment in getattr(layer, "segments", [])) for layer in chunked.layers]
        assert sealed == [sum(segment.seen for segment in getattr(layer, "segments", [])) for layer in cache.layers]


@every_family
@pytest.mark.parametrize("pieces", [(19,), (1,) * 19, (1, 9, 9), (12, 1, 1, 5)], ids=len)
def test_forwards_over_pieces_of_a_text_agree(family, pieces):
    ids = random_ids(batch=2, length=19)
    model = patched(family, "several")
    expected = logits(model, ids, use_cache=False)
    cache = new_cache(model)
    parts = [logits(model, part, past_key_values=cache) for part in ids.split(pieces, dim=1)]
    close(torch.cat(parts, dim=1), expected)


# law 12: the tokens seen drive positions


@whole_matrix
def test_forwards_without_positions_are_generate(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=15)
    expected = greedy(model, ids, tokens=12)
    assert torch.equal(greedy_by_forward(model, ids, tokens=12), expected)
    cache = new_cache(model)
    assert torch.equal(greedy_by_forward(model, ids, tokens=12, cache=cache), expected)
    assert cache.get_seq_length() == 15 + 11
    assert all(layer.get_seq_length() == 15 + 11 for layer in cache.layers)
