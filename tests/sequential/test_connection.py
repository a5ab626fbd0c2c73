"""The index of a folder, where others hold it: processes that fork from this one, and those that write."""

import os
import signal
import sqlite3
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import IDENTITY, chain, ids_of, put_chain

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture
def store(tmp_path):
    with PrefixStore(tmp_path / "store", page_size=8) as opened:
        yield opened


@pytest.fixture
def held(store):
    """Somebody else in a transaction that writes."""
    other = sqlite3.connect(f"{store.url}/index.sqlite", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    yield other
    other.close()


@pytest.fixture
def pages(store):
    found = chain(3)
    put_chain(store, found)
    assert len(list(store.entries())) == 3
    return found


# a fork copies the locks of all threads, and a worker that has run thousands of tests has threads of many packages
forks = pytest.mark.slow


def forked(task):
    """Runs a task in a child that forks from this process; whether it ended and did what it should."""
    child = os.fork()
    if not child:
        try:
            task()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    for _ in range(300):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def looked_up(store, pages):
    assert [match.length for match in store.match(IDENTITY, ids_of(pages)[:21])] == [8, 8, 5]
    # and as where a process ends by itself
    store.close()
    del store.backend._writing, store.backend._reading


def written(store, pages):
    assert None not in put_chain(store, pages)
    assert store.verify() == (6, [])


@forks
def test_a_fork_while_the_writer_waits_hangs_nobody(store, pages, held):
    store.submit(partial(put_chain, store, chain(1, 1)), 1)
    time.sleep(0.5)
    assert not store.backend._writing.closed and not store.backend._reading.closed
    assert forked(partial(looked_up, store, pages))
    held.rollback()
    store.flush()
    assert store.counts.failures == 0 and len(list(store.entries())) == 4


@pytest.mark.parametrize("first", [True, False])
def test_who_reads_waits_for_nobody_who_writes(store, pages, held, first):
    if first:
        # nothing was read before
        store.backend._reading.close()
    store.submit(partial(put_chain, store, chain(1, 1)), 1)
    time.sleep(0.5)
    began = time.monotonic()
    assert [match.length for match in store.match(IDENTITY, ids_of(pages)[:21])] == [8, 8, 5]
    assert len(list(store.entries())) == 3 and store.backend.total() > 0 and store.backend.pins() == {}
    assert time.monotonic() - began < 10
    held.rollback()
    store.flush()
    assert store.counts.failures == 0 and len(list(store.entries())) == 4


@forks
def test_a_child_uses_nothing_that_was_open_before_the_fork(store, pages):
    assert not store.backend._writing.closed and not store.backend._reading.closed
    assert forked(partial(written, store, chain(3, 1)))
    assert None not in put_chain(store, chain(3, 2))
    assert store.verify() == (9, [])


def test_threads_that_fork_at_once_leave_nothing_locked(store, pages):
    tasks = [partial(looked_up, store, pages) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(forked, tasks)) == [True] * 6
    # by a thread that did not fork, and holds no lock
    with ThreadPoolExecutor(1) as threads:
        assert None not in threads.submit(put_chain, store, chain(3, 1)).result(30)
    assert store.verify() == (6, [])
