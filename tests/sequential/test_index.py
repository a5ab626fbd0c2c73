"""The index of a folder: which page shares most with a prompt, and tables of before."""

import sqlite3
from dataclasses import replace

import numpy as np
import pytest

from hf_kvcache.sequential.identity import common_prefix
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import CODECS, CONTEXT, IDENTITY, chain, ids_of, put_chain, random_page

FORMER = """
DROP TABLE pages;
CREATE TABLE pages (
    key TEXT PRIMARY KEY, parent TEXT NOT NULL, head INTEGER NOT NULL, ids BLOB NOT NULL, start INTEGER NOT NULL,
    codec TEXT NOT NULL, size INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL, hits INTEGER NOT NULL,
    seconds REAL NOT NULL, information REAL, model TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX children ON pages (parent, head);
PRAGMA user_version = 0;
"""


@pytest.fixture
def store(tmp_path):
    with PrefixStore(tmp_path / "store", page_size=8) as opened:
        yield opened


def beside(store, ids):
    """Stores a page of these tokens behind the root."""
    store.put(replace(random_page(), ids=np.array(ids, np.uint32)), IDENTITY.root, CODECS["lossless"], CONTEXT)


def test_the_best_fork_is_found_behind_any_number_of_others(store):
    beside(store, [5, 1, 2, 3, 4, 5, 6, 7])
    # used later, and with the same first token
    for other in range(100):
        beside(store, [5, 1000 + other, 0, 0, 0, 0, 0, 0])
    assert [match.length for match in store.match(IDENTITY, [5, 1, 2, 3, 4, 5, 99])] == [6]


def test_the_fork_that_shares_most_is_found(store):
    """Tokens whose bytes order otherwise than their numbers, so that pages part everywhere."""
    choose, letters = np.random.default_rng(0), np.array([1, 256, 65536], np.uint32)
    texts = letters[np.unique(choose.integers(0, 3, (150, 8)), axis=0)]
    for ids in choose.permutation(texts):
        beside(store, ids)
    for query in letters[choose.integers(0, 3, (50, 8))]:
        query[7] = 7
        best = max(common_prefix(ids, query) for ids in texts)
        assert best and [match.length for match in store.match(IDENTITY, query)] == [best]


def test_tables_of_before_keep_what_they_knew(tmp_path):
    pages = chain(3)
    with PrefixStore(tmp_path, page_size=8) as store:
        keys = put_chain(store, pages, seconds=2.0)
        store.pin("a chat", keys[-1])
        entries = list(store.entries())
    index = sqlite3.connect(tmp_path / "index.sqlite")
    index.executescript(FORMER)
    for entry in entries:
        head, ids = int(entry.ids[0]), entry.ids.astype("<u4").tobytes()
        row = (entry.key, entry.parent, head, ids, entry.start, "lossless", entry.size, 1.0, 2.0, 7, 2.0, None, "")
        index.execute(f"INSERT INTO pages VALUES ({', '.join('?' * 13)})", row)
    index.commit()
    index.close()
    with PrefixStore(tmp_path, page_size=8) as store:
        assert [match.length for match in store.match(IDENTITY, ids_of(pages)[:21])] == [8, 8, 5]
        assert [(entry.hits, entry.used, entry.seconds) for entry in store.entries()] == [(7, 2.0, 2.0)] * 3
        assert store.backend.pins() == {"a chat": keys[-1]}
        assert None not in put_chain(store, chain(2, 1))
        assert store.verify() == (5, [])
