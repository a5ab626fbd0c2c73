"""Prompts that wait to be written: their memory is the host's, bounded, and what is dropped harms no other."""

import gc
import threading

import pytest
import torch

from hf_kvcache.sequential.session import ModelFacts, PromptSession
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import CODECS, GEOMETRY, IDENTITY, chain, ids_of, restored, same


class OnDevice(torch.Tensor):
    """A tensor that counts as memory of a device until it is copied to the host; views of it are of the same kind."""

    copied_by: list[str]

    def cpu(self):
        OnDevice.copied_by.append(threading.current_thread().name)
        return self.as_subclass(torch.Tensor).clone()


@pytest.fixture
def store(tmp_path):
    OnDevice.copied_by = []
    with PrefixStore(tmp_path, page_size=8) as opened:
        yield opened


@pytest.fixture
def busy(store):
    """A writer that does not get on before it is told to."""
    go_on = threading.Event()
    store.submit(lambda: go_on.wait(60), 1)
    yield go_on
    go_on.set()


def read(store, *sessions):
    """Reads the prompts of pages, a row of a batch each, as a model on a device does."""
    ids = torch.stack([torch.from_numpy(ids_of(pages).astype("int64")) for pages in sessions])
    session = PromptSession(store, CODECS["lossless"], lambda *_: IDENTITY, ids.shape[1], queries=0)
    facts = ModelFacts("weights", GEOMETRY, [torch.device("cpu")] * 3, lambda *_: pytest.fail("nothing is rotated"))
    assert session.before(ids, None, facts, []) == 0
    for place, producer in enumerate(GEOMETRY.producers):
        pair = [
            torch.stack([torch.cat([getattr(page, name)[place] for page in pages], dim=1) for pages in sessions])
            for name in ("keys", "values")
        ]
        session.take(producer, 0, *(tensor.as_subclass(OnDevice) for tensor in pair))
    session.after()


def on_device():
    gc.collect()
    return sum(type(found) is OnDevice for found in gc.get_objects())


def held(*sessions):
    return sum(sum(t.nbytes for t in [*page.keys, *page.values]) for pages in sessions for page in pages)


def all_there(store, pages):
    return [same(mine, theirs) for mine, theirs in zip(restored(store, ids_of(pages)), pages, strict=True)]


def test_prompts_that_wait_hold_no_memory_of_a_device(store, busy):
    sessions = [chain(2, seed) for seed in range(3)]
    for pages in sessions:
        read(store, pages)
        assert on_device() == 0
    assert set(OnDevice.copied_by) == {"MainThread"} and store.counts.written_pages == 0
    assert store._writer._waiting == 1 + held(*sessions)
    busy.set()
    store.flush()
    assert [all_there(store, pages) for pages in sessions] == [[True, True]] * 3 and store._writer._waiting == 0


def test_the_prompt_that_comes_first_is_copied_in_the_background(store):
    pages = chain(2)
    read(store, pages)
    store.flush()
    assert set(OnDevice.copied_by) == {"hf_kvcache-writer"} and on_device() == 0
    assert all_there(store, pages) == [True, True]


def test_a_prompt_that_finds_no_room_is_neither_copied_nor_kept(store, busy):
    first, second, third = (chain(2, seed) for seed in range(3))
    store._writer.most_waiting = 1 + held(first)
    read(store, first)
    copied = len(OnDevice.copied_by)
    with pytest.warns(RuntimeWarning, match="faster than they can be written"):
        read(store, second)
    assert on_device() == 0 and len(OnDevice.copied_by) == copied and store.counts.dropped_pages == 1
    busy.set()
    store.flush()
    # what waited is stored, what was dropped is a miss, and there is room again
    assert all_there(store, first) == [True, True] and store.match(IDENTITY, ids_of(second)) == []
    read(store, third)
    store.flush()
    assert all_there(store, third) == [True, True] and store.counts.dropped_pages == 1


def test_a_batch_counts_with_all_that_it_holds(store, busy):
    first, second = (chain(2, seed) for seed in range(2))
    # two rows are one prompt, and are held all the same
    read(store, first, second, first)
    assert store._writer._waiting == 1 + held(first, second, first) and on_device() == 0
    busy.set()
    store.flush()
    assert all_there(store, first) == all_there(store, second) == [True, True] and store.counts.written_pages == 4


def test_where_the_host_has_no_room_the_prompt_is_tried_again_and_the_run_goes_on(store, busy, monkeypatch):
    def fail(self):
        OnDevice.copied_by.append(threading.current_thread().name)
        raise RuntimeError("no memory on the host")

    with monkeypatch.context() as patch:
        patch.setattr(OnDevice, "cpu", fail)
        read(store, chain(2))
        assert store.counts.failures == 0
        with pytest.warns(RuntimeWarning, match="no memory on the host"):
            busy.set()
            store.flush()
    assert OnDevice.copied_by == ["MainThread", "hf_kvcache-writer"] and on_device() == 0
    read(store, chain(2))
    store.flush()
    assert all_there(store, chain(2)) == [True, True] and store._writer._waiting == 0
