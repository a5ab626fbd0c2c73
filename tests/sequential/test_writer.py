"""The thread that writes pages: nothing ends it, nothing waits for it in vain, and it holds no store for ever."""

import gc
import subprocess
import sys
import threading
import time
import warnings
import weakref

import pytest

from hf_kvcache import patch_model
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import IDENTITY, chain, ids_of, put_chain, restored
from hf_kvcache.testing import greedy, random_ids, tiny_model


@pytest.fixture
def store(tmp_path):
    with PrefixStore(tmp_path / "store", page_size=8) as opened:
        yield opened


def test_a_task_that_raises_is_said_and_the_next_one_runs(store):
    done = []
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        store.submit(lambda: done.append(1 / 0), 10)
        store.submit(lambda: done.append(2), 10)
        store.flush()
    assert done == [2]


def test_a_warning_that_is_an_error_does_not_end_the_writer(store):
    done = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.submit(lambda: done.append(1 / 0), 10)
        store.submit(lambda: done.append(2), 10)
        assert_ends(store.flush)
    assert done == [2] and store.counts.failures == 1


def test_a_writer_that_has_ended_is_started_again(store):
    done = []
    store.submit(sys.exit, 10)
    store.submit(lambda: done.append(1), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_ends(store.flush)
    for wait in (store.flush, store.close):
        # as if something had ended the thread before its task
        store._writer._thread = threading.Thread()
        store._writer._tasks.append((lambda: done.append(2), 0))
        store._writer._accepted += 1
        assert_ends(wait)
    assert_ends(store.flush)
    assert done == [1, 2, 2]


def assert_ends(call):
    waiting = threading.Thread(target=call, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()


def test_pages_that_come_too_fast_are_dropped(store):
    store._writer.most_waiting = 100
    with pytest.warns(RuntimeWarning, match="faster"):
        for _ in range(5):
            store.submit(lambda: time.sleep(0.05), 60)
        store.flush()
    assert 1 <= store.counts.dropped_pages <= 4


def test_a_thread_is_there_as_long_as_there_are_tasks(store):
    done, go_on = [], threading.Event()
    for number in range(3):
        store.submit(go_on.wait if not number else lambda: done.append(1), 10)
    assert writers()[-1].daemon
    go_on.set()
    store.close()
    assert done == [1, 1] and not writers()
    # a store that was closed opens again
    pages = chain(2)
    put_chain(store, pages)
    store.submit(lambda: done.append(2), 10)
    store.flush()
    assert done == [1, 1, 2] and len(restored(store, ids_of(pages))) == 2


UNFINISHED = """
import sys, time
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import chain, put_chain
store = PrefixStore(sys.argv[1], page_size=8)
for seed in range(3):
    store.submit(lambda seed=seed: (time.sleep(0.2), put_chain(store, chain(2, seed))), 10)
"""


def test_what_waits_when_the_process_ends_is_written(tmp_path):
    subprocess.run([sys.executable, "-c", UNFINISHED, str(tmp_path)], check=True)
    with PrefixStore(tmp_path, page_size=8) as store:
        assert store.verify() == (6, [])


def test_many_threads_may_submit_at_once(store):
    done = []
    threads = [
        threading.Thread(target=lambda: [store.submit(lambda: done.append(1), 1) for _ in range(100)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_ends(store.flush)
    assert len(done) == 800 and store._writer._waiting == 0


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "hf_kvcache-writer"]


def test_a_store_that_nobody_knows_any_more_is_let_go_of(tmp_path):
    store = PrefixStore(tmp_path, page_size=8)
    backend, known, pages = store.backend, weakref.ref(store), chain(3)
    store.submit(lambda store=store: put_chain(store, pages), 10)
    del store
    assert_goes(known)
    assert backend._writing.closed and backend._reading.closed
    # what waited was written before
    with PrefixStore(tmp_path, page_size=8) as other:
        assert len(other.match(IDENTITY, ids_of(pages))) == 3


def test_a_model_that_is_never_unpatched_leaves_no_thread_and_no_open_file(tmp_path):
    model, ids = patch_model(tiny_model("llama"), "sequential", store=tmp_path), random_ids(length=300)
    greedy(model, ids)
    store = model._hf_kvcache.spec.prefix.store
    backend, known = store.backend, weakref.ref(store)
    del model, store
    assert_goes(known)
    assert backend._writing.closed and backend._reading.closed and not writers()
    assert {len(entry.ids) for entry in PrefixStore(tmp_path).entries()} == {256, 44}


def assert_goes(known):
    for _ in range(600):
        gc.collect()
        if known() is None:
            return
        time.sleep(0.1)
    raise AssertionError(f"still there, held by {gc.get_referrers(known())}")
