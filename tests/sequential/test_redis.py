"""What is Redis's own: the sum of the bytes, what the server drops by itself, and servers that go."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_kvcache import patch_model
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import CODECS, CONTEXT, IDENTITY, chain, competitors, put_chain, random_page
from hf_kvcache.testing import greedy, random_ids, tiny_model
from tests.sequential.servers import free_port, redis_binary, redis_server


@pytest.fixture
def client(redis_url):
    """Of an empty server."""
    import redis

    own = redis.Redis.from_url(redis_url)
    own.flushall()
    return own


def test_a_redis_keeps_the_sum_of_its_bytes(redis_url, client, monkeypatch):
    store, pages = PrefixStore(redis_url, page_size=8), chain(4)

    def agrees():
        return store.backend.total() == sum(entry.size for entry in store.entries())

    assert store.backend.total() == 0
    keys = put_chain(store, pages)
    assert agrees() and store.backend.total() > 0
    # the same page written again, larger, and pages removed, once and twice
    entry = next(entry for entry in store.entries() if entry.key == keys[3])
    store.backend.write(replace(entry, size=entry.size + 5), store.backend.read(entry.key, entry.parent) + b"12345")
    assert agrees()
    for _ in range(2):
        store.backend.delete(keys[3], keys[2])
        assert agrees()
    # what the server drops by itself
    client.delete("hf_kvcache:bytes")
    assert agrees()
    client.delete(f"hf_kvcache:page:{keys[2]}", f"hf_kvcache:entry:{keys[2]}")
    store.gc()
    assert agrees() and store.backend.total() > 0
    # one question to the server, however many pages
    monkeypatch.setattr(store.backend, "entries", lambda: pytest.fail("all entries were read"))
    assert store.backend.total() > 0


def test_processes_share_a_redis(redis_url):
    totals = competitors(redis_url, processes=3, seconds=2.0)
    assert totals["ended"] == 3 and totals["written"] > 0
    assert totals["wrong"] == totals["not_stored"] == totals["failures"] == 0


def test_generation_goes_on_when_the_server_goes(redis_url):
    model, ids = tiny_model("llama"), random_ids(length=45)
    with redis_server(redis_binary()) as (port, _):
        store = PrefixStore(f"redis://127.0.0.1:{port}/0", page_size=8)
        patch_model(model, "sequential", store=store)
        expected = greedy(model, ids)
        store.flush()
        assert torch.equal(greedy(model, ids), expected) and store.counts.adopted_tokens == 44
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(greedy(model, ids), expected)
            store.flush()
    about = [str(warning.message) for warning in said if "prefix store" in str(warning.message)]
    assert len(about) == len(set(about)) == 2, "one warning for looking up, one for writing"


def test_a_server_that_is_not_there_is_survived():
    pytest.importorskip("redis", reason="redis is not installed")
    store = PrefixStore(f"redis://user:password@127.0.0.1:{free_port()}/0", page_size=8)
    with pytest.warns(RuntimeWarning, match="cannot be written") as said:
        assert store.put(random_page(), IDENTITY.root, CODECS["lossless"], CONTEXT) is None
    assert "password" not in str(said[0].message)


def beside(store, count):
    """Pages that share more and more tokens with the last one; their keys and ids."""
    last = random_page()
    texts = [np.where(np.arange(8) < shared, last.ids, shared).astype(np.uint32) for shared in range(1, count)]
    pages = [*(replace(last, ids=ids) for ids in texts), last]
    keys = [store.put(page, IDENTITY.root, CODECS["lossless"], CONTEXT) for page in pages]
    return keys, [page.ids for page in pages]


def test_pages_that_the_server_dropped_hide_no_others_after_gc(redis_url, client):
    store = PrefixStore(redis_url, page_size=8)
    keys, ids = beside(store, 8)
    # pages alone, pages with their entries, and then all keys
    client.delete(*(f"hf_kvcache:page:{key}" for key in keys[5:]), f"hf_kvcache:entry:{keys[6]}", "hf_kvcache:all")
    assert [match.length for match in store.match(IDENTITY, ids[7][:7])] != [5]
    store.gc()
    assert [match.length for match in store.match(IDENTITY, ids[7][:7])] == [5]
    assert sorted(entry.key for entry in store.entries()) == sorted(keys[:5])
    assert client.zcard(f"hf_kvcache:after:{IDENTITY.root}") == client.scard("hf_kvcache:all") == 5
    assert store.backend.total() == sum(entry.size for entry in store.entries())


def test_pages_whose_entry_the_server_dropped_are_removed(redis_url, client):
    store = PrefixStore(redis_url, page_size=8)
    keys, _ = beside(store, 4)
    client.delete(f"hf_kvcache:entry:{keys[0]}")
    size = client.strlen(f"hf_kvcache:page:{keys[0]}")
    assert store.gc() == size and store.gc() == 0
    assert client.exists(f"hf_kvcache:page:{keys[0]}") == 0
    store.gc(limit_bytes=0)
    assert client.keys("hf_kvcache:*") == [b"hf_kvcache:bytes"] and store.backend.total() == 0


def test_a_hit_of_a_page_that_has_gone_leaves_nothing(redis_url, client):
    store = PrefixStore(redis_url, page_size=8)
    keys, _ = beside(store, 2)
    store.backend.delete(keys[0], IDENTITY.root)
    store.backend.used([(key, IDENTITY.root) for key in keys])
    assert client.keys("hf_kvcache:entry:*") == [f"hf_kvcache:entry:{keys[1]}".encode()]
    assert [(entry.hits, entry.used > entry.created) for entry in store.entries()] == [(1, True)]
