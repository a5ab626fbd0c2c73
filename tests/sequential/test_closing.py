"""A store that `patch_model` opens is closed with the patch, and nobody who goes on is stopped by it."""

import copy
import threading
import time

import pytest
import torch

from hf_kvcache import new_cache, patch_model, unpatch_model
from hf_kvcache.sequential.backends.directory import Directory
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.testing import greedy, random_ids, tiny_model


@pytest.fixture
def slow(monkeypatch):
    """A disk on which a page takes its time."""
    written = Directory.write
    monkeypatch.setattr(Directory, "write", lambda *args: (time.sleep(0.3), written(*args)))


def store_of(model):
    return model._hf_kvcache.spec.prefix.store


def closed(store):
    return store.backend._writing.closed and store.backend._reading.closed and store._writer._thread is None


def lengths(folder):
    with PrefixStore(folder) as store:
        return sorted(len(entry.ids) for entry in store.entries())


@pytest.mark.parametrize("end", [unpatch_model, lambda model: patch_model(model, None)], ids=["unpatched", "patched"])
def test_what_patch_model_opens_is_written_and_closed(end, tmp_path, slow):
    model = patch_model(tiny_model("llama"), "sequential", store=tmp_path)
    greedy(model, random_ids(length=300))
    store = store_of(model)
    assert not closed(store)
    end(model)
    assert closed(store) and store.counts.failures == 0 and lengths(tmp_path) == [44, 256]


def test_the_users_store_stays_open_and_is_not_waited_for(tmp_path, monkeypatch):
    written, go_on = Directory.write, threading.Event()
    monkeypatch.setattr(Directory, "write", lambda *args: (go_on.wait(60), written(*args)))
    with PrefixStore(tmp_path) as store:
        model = patch_model(tiny_model("llama"), "sequential", store=store)
        greedy(model, random_ids(length=300))
        unpatch_model(patch_model(model, "sequential", store=store))
        assert not closed(store) and store.counts.written_pages == 0
        go_on.set()
    assert closed(store) and lengths(tmp_path) == [44, 256]


def test_a_store_is_closed_before_it_is_opened_again(tmp_path, slow):
    model, ids = patch_model(tiny_model("llama"), "sequential", store=tmp_path), random_ids(length=300)
    expected = greedy(model, ids)
    first = store_of(model)
    patch_model(model, "turboquant+sequential", bits=8, store=tmp_path)
    # so the pages of the first are found by the second
    assert closed(first) and store_of(model) is not first
    patch_model(model, "sequential", store=tmp_path)
    assert torch.equal(greedy(model, ids), expected)
    assert store_of(model).counts.adopted_tokens == 299
    unpatch_model(model)


def test_a_cache_goes_on_after_its_store_was_closed(tmp_path):
    model, reference, ids = tiny_model("llama"), patch_model(tiny_model("llama"), None), random_ids(length=300)
    cache = new_cache(patch_model(model, "sequential", store=tmp_path))
    cache.expect(300)
    first = store_of(model)
    with torch.no_grad():
        model.model(input_ids=ids[:, :100], past_key_values=cache)
        unpatch_model(model)
        assert closed(first)
        patch_model(model, "sequential", store=tmp_path)
        model.model(input_ids=ids[:, 100:], past_key_values=cache)
    full = torch.cat([ids, random_ids(length=2, seed=8)], dim=1)
    assert torch.equal(greedy(model, full, past_key_values=cache), greedy(reference, full))
    first.close()
    assert first.counts.written_pages == 2 and lengths(tmp_path) == [44, 256]


def test_a_copy_of_the_model_goes_on_when_the_other_is_unpatched(tmp_path):
    model, ids = patch_model(tiny_model("llama"), "sequential", store=tmp_path), random_ids(length=300)
    expected, copied = greedy(model, ids), copy.deepcopy(model)
    unpatch_model(model)
    assert torch.equal(greedy(copied, ids), expected) and store_of(copied).counts.adopted_tokens == 299
    unpatch_model(copied)


def test_a_patch_that_fails_leaves_the_store_in_use(tmp_path):
    model, ids = patch_model(tiny_model("llama"), "sequential", store=tmp_path), random_ids(length=300)
    expected, first = greedy(model, ids), store_of(model)
    with pytest.raises(ValueError, match="codec must be one of"):
        patch_model(model, "sequential", store=tmp_path / "other", codec="zip")
    assert store_of(model) is first
    assert torch.equal(greedy(model, ids), expected) and first.counts.adopted_tokens == 299
    unpatch_model(model)
    assert closed(first)
