"""A cache that is cropped, emptied or given other rows goes on as if it had read just what is left."""

import pytest
import torch

from hf_kvcache import new_cache
from hf_kvcache.testing import greedy, left_pad, random_ids
from tests.generate.models import FULL, every_family, every_method, patched


@pytest.mark.parametrize(
    ("family", "removed"),
    [
        # a window keeps the past of one forward only
        *((family, removed) for family in FULL for removed in (0, 1, 4, 9, 15)),
        *((family, removed) for family in ("mistral", "gemma2") for removed in (0, 1, 4)),
    ],
)
@every_method
def test_crop_forgets_the_last_tokens(family, method, removed):
    """12 tokens are sealed and 4 are in the tail."""
    model = patched(family, method)
    ids = random_ids(batch=2, length=16)
    cache = new_cache(model)
    if family not in FULL:
        cache.activate_past_recording()  # transformers' condition for cropping a window
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        cache.crop(0)
        model(ids[:, 12:], past_key_values=cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == 16 - removed
        again = random_ids(batch=2, length=6, seed=7)
        actual = model(again, past_key_values=cache).logits
        text = torch.cat([ids[:, : 16 - removed], again], dim=1)
        expected = model(text, use_cache=False).logits[:, -6:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FULL)
@every_method
def test_crop_of_everything_leaves_an_empty_cache(family, method):
    model = patched(family, method)
    ids = random_ids(batch=2, length=10)
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.crop(-10)
        assert cache.get_seq_length() == 0
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("removed", [2, 9])
def test_crop_of_a_padded_batch(family, removed):
    model = patched(family, "shared")
    rows = [random_ids(length=length, seed=length)[0] for length in (14, 8)]
    ids, mask = left_pad(rows)
    nexts = random_ids(batch=2, length=1, seed=5)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).past_key_values
        cache.crop(-removed)
        mask = torch.cat([mask[:, :-removed], torch.ones_like(nexts)], dim=1)
        positions = mask.sum(-1, keepdim=True) - 1
        actual = model(nexts, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for index, row in enumerate(rows):
            text = torch.cat([row[:-removed], nexts[index]])[None]
            expected = model(text, use_cache=False).logits[:, -1]
            torch.testing.assert_close(actual[index], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_crop_takes_what_to_remove_or_what_to_keep(family):
    """Newer releases of transformers pass the first, a negative number; 5.14 at times the second, a positive one."""
    removed, kept = (patched(family, "none")(random_ids(length=6)).past_key_values for _ in range(2))
    removed.crop(-2)
    kept.crop(4)
    assert removed.get_seq_length() == kept.get_seq_length() == 4
    kept.crop(9)
    assert kept.get_seq_length() == 4


@every_family
@every_method
def test_reset_empties_a_cache(family, method):
    model = patched(family, method)
    cache = new_cache(model)
    ids = random_ids(batch=2, length=12)
    first = greedy(model, ids, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(greedy(model, ids, past_key_values=cache), first)


@every_family
@every_method
def test_rows_can_be_repeated_and_selected(family, method):
    model = patched(family, method)
    ids = random_ids(batch=3, length=14)
    nexts = random_ids(batch=6, length=5, seed=3)
    rows = torch.tensor([4, 0, 5, 1])  # of the repeated batch
    with torch.no_grad():
        cache = model(ids).past_key_values
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 6
        repeated = model(nexts[:, :3], past_key_values=cache).logits
        cache.batch_select_indices(rows)
        assert cache.batch_size == 4
        selected = model(nexts[rows, 3:], past_key_values=cache).logits
        text = torch.cat([ids.repeat_interleave(2, 0), nexts], dim=1)
        expected = model(text, use_cache=False).logits
    torch.testing.assert_close(repeated, expected[:, 14:17], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(selected, expected[rows, 17:], rtol=1e-4, atol=1e-4)


@every_family
@every_method
def test_rows_can_be_reordered(family, method):
    model = patched(family, method)
    ids, nexts = random_ids(batch=3, length=14), random_ids(batch=3, length=4, seed=3)
    order = torch.tensor([2, 2, 0])
    with torch.no_grad():
        cache = model(ids).past_key_values
        model(nexts[:, :2], past_key_values=cache)
        cache.reorder_cache(order)
        actual = model(nexts[:, 2:], past_key_values=cache).logits
        text = torch.cat([ids[order], nexts[order, :2], nexts[:, 2:]], dim=1)
        expected = model(text, use_cache=False).logits[:, -2:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
