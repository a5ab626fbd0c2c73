"""What a store removes: above a limit what is worth least, and nothing that is pinned."""

import numpy as np
import pytest

from hf_kvcache.sequential import eviction
from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import IDENTITY, chain, ids_of, put_chain, restored


def test_a_limit_keeps_what_is_worth_most(tmp_path):
    size = PrefixStore(tmp_path / "one", page_size=8)
    put_chain(size, chain(1))
    page = size.backend.total()
    store = PrefixStore(tmp_path / "two", page_size=8, limit_bytes=int(6.5 * page))
    shared = chain(3)
    put_chain(store, shared, seconds=10.0)
    for _ in range(3):
        store.adopted(store.match(IDENTITY, ids_of(shared)), 24)
        store.flush()
    for seed in range(1, 9):
        put_chain(store, chain(1, seed), seconds=1.0)
        assert store.backend.total() <= store.limit_bytes
    assert len(store.match(IDENTITY, ids_of(shared))) == 3
    assert len(list(store.entries())) == 6
    # no page without those before it
    keys = {entry.key for entry in store.entries()}
    assert all(entry.parent in keys or entry.parent == IDENTITY.root for entry in store.entries())


def test_a_limit_below_a_page_is_said(tmp_path):
    store = PrefixStore(tmp_path, page_size=8, limit_bytes=100)
    with pytest.warns(RuntimeWarning, match="limit_bytes=100 is smaller than one page"):
        assert put_chain(store, chain(1)) == [None]
    assert restored(store, ids_of(chain(1))) == []


def test_pins_hold_a_session(tmp_path):
    store = PrefixStore(tmp_path, page_size=8)
    first, second = chain(3), chain(3, 1)
    keys = put_chain(store, first)
    put_chain(store, second)
    store.pin("a chat", keys[-1])
    store.gc(limit_bytes=1)
    assert sorted(entry.key for entry in store.entries()) == sorted(keys)
    store.pin("a chat", None)
    store.gc(limit_bytes=1)
    assert list(store.entries()) == []


def test_pages_of_another_tenant_do_not_cost_ones_own(tmp_path):
    """They count, and whoever cannot read them cannot remove them: to remove all of one's own would gain nothing."""
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    url = f"local://{tmp_path}"
    put_chain(PrefixStore(url, page_size=8, secret=b"a"), chain(10))
    own = put_chain(PrefixStore(url, page_size=8, secret=b"b"), chain(4, 1))
    limit = PrefixStore(url, page_size=8).backend.total() // 2
    store = PrefixStore(url, page_size=8, secret=b"b", limit_bytes=limit)
    with pytest.warns(RuntimeWarning, match=f"limit_bytes={limit} leaves no room .* another secret") as said:
        assert put_chain(store, chain(2, 2)) == [None, None]
    assert len(said) == 1
    assert sorted(entry.key for entry in store.entries()) == sorted(own)
    with pytest.warns(RuntimeWarning, match="kept"):
        assert store.gc() == 0
    assert sorted(entry.key for entry in store.entries()) == sorted(own)


def test_a_limit_that_pins_fill_is_said(tmp_path):
    with PrefixStore(tmp_path, page_size=8) as store:
        first, second = put_chain(store, chain(3)), put_chain(store, chain(1, 1))
        store.pin("a chat", first[-1])
        pinned = sum(entry.size for entry in store.entries() if entry.key in first)
    with PrefixStore(tmp_path, page_size=8, limit_bytes=pinned) as store:
        with pytest.warns(RuntimeWarning, match="too many are pinned"):
            assert put_chain(store, chain(1, 2)) == [None]
        assert sorted(entry.key for entry in store.entries()) == sorted(first + second)


def test_worth_follows_time_bytes_and_reuse():
    def entry(**fields):
        plain = {"size": 100, "created": 0.0, "seconds": 1.0, "information": 10.0}
        return Entry("a" * 64, "b" * 64, np.zeros(1, np.uint32), 0, "lossless", **{**plain, **fields})

    plain = eviction.worth(entry(), 10.0)
    assert eviction.worth(entry(seconds=2.0), 10.0) == pytest.approx(2 * plain)
    assert eviction.worth(entry(size=200), 10.0) == pytest.approx(plain / 2)
    assert eviction.worth(entry(hits=1), 10.0) > 100 * plain
    # the model's prior counts for a likely page, and is forgotten after a few hits
    likely = eviction.worth(entry(information=1.0), 10.0)
    assert likely == pytest.approx(2**9 * plain)
    used = [eviction.worth(entry(information=bits, hits=20), 10.0) for bits in (1.0, 10.0, None)]
    assert used[0] / used[2] == pytest.approx(1, rel=0.03)
