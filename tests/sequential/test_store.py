"""The store of pages in a folder: exact reuse, failures that are survived, and what crashes leave."""

import errno
import os
import sqlite3
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from hf_kvcache.sequential import eviction
from hf_kvcache.sequential.backends import open_backend
from hf_kvcache.sequential.backends.directory import Directory
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import (
    CODECS,
    CONTEXT,
    IDENTITY,
    chain,
    competitors,
    ids_of,
    kill_a_writer,
    put_chain,
    random_page,
    resigned,
    restored,
    same,
    write_beyond_the_disk,
)


@pytest.fixture
def store(tmp_path):
    with PrefixStore(tmp_path / "store", page_size=8) as opened:
        yield opened


def test_what_is_put_is_found_by_its_tokens(store):
    pages = chain(4)
    put_chain(store, pages)
    for page, found in zip(pages, restored(store, ids_of(pages)), strict=True):
        assert same(found, page)
    assert restored(store, ids_of(pages)[1:]) == []
    assert len(store.match(IDENTITY, ids_of(pages)[:17])) == 3


def test_a_fork_shares_pages_and_the_beginning_of_one(store):
    pages = chain(4)
    put_chain(store, pages)
    ids = ids_of(pages).copy()
    ids[21:] += 1
    matches = store.match(IDENTITY, ids)
    assert [match.length for match in matches] == [8, 8, 5]
    assert same(store.load(matches[2], CODECS, CONTEXT), pages[2])
    # the branch is written beside the old page, which stays as it is
    branch = random_page(77, start=16)
    branch.ids[:] = ids[16:24]
    store.put(branch, matches[1].key, CODECS["lossless"], CONTEXT)
    assert [match.length for match in store.match(IDENTITY, ids)][:3] == [8, 8, 8]
    assert same(restored(store, ids_of(pages))[2], pages[2])


@pytest.mark.parametrize("sessions", [1, 5, 20])
def test_shared_pages_are_stored_once(store, sessions):
    """Bytes = shared once + each session's own: the formula and the folder agree to a percent."""
    shared, own = chain(10), [chain(3, seed, behind=10) for seed in range(1, sessions + 1)]
    parents = put_chain(store, shared)
    one = sum(entry.size for entry in store.entries())
    for pages in own:
        parent = put_chain(store, shared)[-1]
        for page in pages:
            parent = store.put(page, parent, CODECS["lossless"], CONTEXT)
    alone = sum(entry.size for entry in store.entries()) - one
    on_disk = sum(path.stat().st_size for path in Path(store.url).glob("pages/*/*"))
    per_page = one / len(shared)
    assert on_disk == pytest.approx(per_page * (len(shared) + 3 * sessions), rel=0.01)
    assert on_disk == one + alone == store.backend.total()
    assert len(set(parents)) == 10
    assert eviction.references(list(store.entries()))[parents[-1]] == sessions


def test_tenants_do_not_see_each_other(store):
    from dataclasses import replace

    pages = chain(2)
    put_chain(store, pages)
    for other in ({"namespace": "b"}, {"fingerprint": "x"}, {"weights": "x"}, {"dtype": "x"}, {"codec": "x"}):
        assert store.match(replace(IDENTITY, **other), ids_of(pages)) == []
    # also where a page is asked for by a key that is known: it is of another root
    key = store.match(IDENTITY, ids_of(pages))[0]
    forged = replace(key, parent=replace(IDENTITY, namespace="b").root)
    with pytest.warns(RuntimeWarning, match="another one"):
        assert store.load(forged, CODECS, CONTEXT) is None


def test_damaged_pages_are_dropped_and_said_once(store):
    pages = chain(3)
    keys = put_chain(store, pages)
    paths = {path.name: path for path in Path(store.url).glob("pages/*/*")}
    for key in keys[1:]:
        data = bytearray(paths[key].read_bytes())
        data[len(data) // 2] ^= 4
        paths[key].write_bytes(data)
    with pytest.warns(RuntimeWarning, match="checksum") as said:
        found = restored(store, ids_of(pages))
    assert len(said) == 1
    assert same(found[0], pages[0])
    assert found[1:] == [None, None] and store.counts.damaged_pages == 2
    assert [entry.key for entry in store.entries()] == keys[:1]
    put_chain(store, pages)
    assert same(restored(store, ids_of(pages))[2], pages[2])


@pytest.mark.parametrize("scheme", ["", "local://"])
@pytest.mark.parametrize("reader", [b"", b"two"])
def test_pages_of_another_secret_are_kept_and_said_once(tmp_path, scheme, reader):
    if scheme:
        pytest.importorskip("fsspec", reason="fsspec is not installed")
    url, pages = f"{scheme}{tmp_path}/store", chain(3)
    with PrefixStore(url, page_size=8, secret=b"one") as owner:
        put_chain(owner, pages)
        # found again without the index too
        for path in (tmp_path / "store").glob("index.sqlite*"):
            path.unlink()
    store = PrefixStore(url, page_size=8, secret=reader)
    with pytest.warns(RuntimeWarning, match="secret") as said:
        assert restored(store, ids_of(pages)) == [None] * 3
        assert store.verify() == (0, []) and store.gc() == 0
    assert len(said) == 1 and store.counts.unreadable_pages == 9 and store.counts.damaged_pages == 0
    with PrefixStore(url, page_size=8, secret=b"one") as owner:
        assert owner.verify() == (3, [])
        assert all(same(found, page) for found, page in zip(restored(owner, ids_of(pages)), pages, strict=True))


def test_a_page_of_a_later_format_keeps_what_is_behind_it(tmp_path):
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    store = PrefixStore(f"local://{tmp_path}", page_size=8)
    put_chain(store, chain(3))
    first = next(entry for entry in store.entries() if entry.start == 0)
    later = bytearray(store.backend.read(first.key, first.parent))
    later[8] += 1
    store.backend.write(first, resigned(bytes(later)))
    with pytest.warns(RuntimeWarning, match="upgrade"):
        assert store.gc() == 0 and store.verify() == (2, [])


def test_stores_with_a_secret_are_apart(tmp_path):
    tenants = {PrefixStore(tmp_path, namespace=n, secret=s).tenant for n in ("", "a") for s in (b"", b"one", b"two")}
    assert len(tenants) == 6
    assert PrefixStore(tmp_path, namespace="a").tenant == "a"


def test_an_index_that_lies_is_not_believed(store):
    pages = chain(2)
    key = put_chain(store, pages)[1]
    ids = ids_of(pages).copy()
    # the same first token, and another text
    ids[9:] += 1
    store.backend._run("UPDATE pages SET ids = ? WHERE key = ?", (ids[8:].astype("<u4").tobytes(), key))
    assert [match.length for match in store.match(IDENTITY, ids[:13])] == [8]


@pytest.mark.parametrize("blob", [b"abcde", b"", 7, "text"])
def test_ids_that_an_index_has_not_are_read_from_the_page(store, blob):
    pages = chain(2)
    key = put_chain(store, pages)[1]
    store.backend._run("UPDATE pages SET ids = ? WHERE key = ?", (blob, key))
    assert [match.length for match in store.match(IDENTITY, ids_of(pages)[:13])] == [8, 5]
    assert np.array_equal(np.concatenate([entry.ids for entry in store.entries()]), ids_of(pages))
    assert store.verify() == (2, [])


def test_verify_finds_what_is_damaged_and_missing(store):
    keys = put_chain(store, chain(5))
    paths = {path.name: path for path in Path(store.url).glob("pages/*/*")}
    paths[keys[1]].write_bytes(b"nonsense")
    paths[keys[4]].unlink()
    assert store.verify() == (3, [keys[1]])
    assert store.verify() == (3, [])
    # what stood behind the damaged page is reached by nobody
    assert store.gc() > 0
    assert [entry.key for entry in store.entries()] == keys[:1]


@pytest.mark.parametrize("damage", ["gone", "nonsense", "empty"])
def test_the_index_is_rebuilt_from_the_pages(tmp_path, damage):
    pages = chain(4)
    with PrefixStore(tmp_path, page_size=8) as store:
        keys = put_chain(store, pages)
    index = tmp_path / "index.sqlite"
    for path in (index, *tmp_path.glob("index.sqlite-*")):
        path.unlink()
    if damage == "nonsense":
        index.write_bytes(os.urandom(8192))
    elif damage == "empty":
        index.touch()
    with PrefixStore(tmp_path, page_size=8) as store:
        assert all(found is not None for found in restored(store, ids_of(pages)))
        assert store.verify() == (4, [])
        assert sorted(entry.key for entry in store.entries()) == sorted(keys)
        assert [m.length for m in store.match(IDENTITY, ids_of(pages)[:12])] == [8, 4]


def test_failures_are_said_once_and_nothing_else_happens(tmp_path, monkeypatch):
    store, pages = PrefixStore(tmp_path, page_size=8), chain(3)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.warns(RuntimeWarning, match="No space left") as said:
        for page in pages:
            assert store.put(page, IDENTITY.root, CODECS["lossless"], CONTEXT) is None
    assert len(said) == 1 and store.counts.failures == 3
    assert list(tmp_path.glob("pages/*/*")) == []
    monkeypatch.undo()
    put_chain(store, pages)
    assert len(restored(store, ids_of(pages))) == 3


def test_a_full_disk_is_survived(tmp_path):
    """A real one: the system refuses to let a file grow beyond a size that no page fits into."""
    pytest.importorskip("resource", reason="no limits on this system")
    assert write_beyond_the_disk(str(tmp_path)) == (1, 2, ["File too large"])
    with PrefixStore(tmp_path, page_size=8) as store:
        assert store.verify() == (1, [])


def test_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    pages = chain(2)
    with PrefixStore(tmp_path, page_size=8) as store:
        put_chain(store, pages)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and allowed(path, mode))
    opened = Path.open

    def refuse(path, mode="r", *args, **kwargs):
        if "w" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    store = PrefixStore(tmp_path, page_size=8)
    assert len([page for page in restored(store, ids_of(pages)) if page is not None]) == 2
    with pytest.warns(RuntimeWarning) as said:
        for seed in (5, 6):
            assert store.put(random_page(seed), IDENTITY.root, CODECS["lossless"], CONTEXT) is None
        store.adopted(store.match(IDENTITY, ids_of(pages)), 16)
        store.flush()
    assert sorted("Read-only" in str(w.message) or "readonly" in str(w.message) for w in said) == [True, True]


def test_a_store_that_is_gone_is_survived(store):
    import shutil

    pages = chain(2)
    put_chain(store, pages)
    shutil.rmtree(store.url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert set(restored(store, ids_of(pages))) <= {None}
        store.put(pages[0], IDENTITY.root, CODECS["lossless"], CONTEXT)


def test_gc_removes_tails_that_a_longer_page_stands_for(store):
    whole = random_page(1)
    key = store.put(whole.first(3), IDENTITY.root, CODECS["lossless"], CONTEXT)
    other = random_page(2).first(3)
    kept = store.put(other, IDENTITY.root, CODECS["lossless"], CONTEXT)
    full = store.put(whole, IDENTITY.root, CODECS["lossless"], CONTEXT)
    assert store.gc() > 0
    assert {entry.key for entry in store.entries()} == {kept, full} and key not in (kept, full)


def test_scratch_files_of_the_dead_are_removed(store):
    put_chain(store, chain(1))
    folder = next(Path(store.url).glob("pages/*"))
    dead, alive = folder / ".dead", folder / ".alive"
    for path in (dead, alive):
        path.write_bytes(b"x" * 10)
    os.utime(dead, (time.time() - 3600,) * 2)
    assert store.gc() == 10
    assert not dead.exists() and alive.exists()


def test_a_scratch_file_that_its_writer_renames_meanwhile_is_no_failure(store, monkeypatch):
    put_chain(store, chain(1))
    renamed = next(Path(store.url).glob("pages/*")) / ".renamed"
    found = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [*found(path, pattern), renamed])
    assert store.gc() == 0 and store.verify() == (1, [])


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_a_page_that_is_removed_meanwhile_is_not_damaged(tmp_path, scheme, monkeypatch):
    if scheme:
        pytest.importorskip("fsspec", reason="fsspec is not installed")
    store, other = (PrefixStore(f"{scheme}{tmp_path}", page_size=8) for _ in range(2))
    put_chain(store, chain(2))
    victim = next(entry for entry in store.entries() if entry.start == 8)
    listed = list(store.entries())
    other.backend.delete(victim.key, victim.parent)
    monkeypatch.setattr(store.backend, "entries", lambda: iter(listed))
    assert store.verify() == (1, [])


def test_urls_and_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="page_size"):
        PrefixStore(tmp_path, page_size=0)
    with pytest.raises(ValueError, match="limit_bytes"):
        PrefixStore(tmp_path, limit_bytes=0)
    with pytest.raises(ValueError, match="secret"):
        PrefixStore(tmp_path, secret=b"x" * 65)
    with pytest.raises(ValueError, match=r"no driver opens the store nonsense://place: .*pass a folder"):
        PrefixStore("nonsense://place")
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=r"needs a folder that it can write to.*file"):
            PrefixStore(path)
    assert isinstance(open_backend(f"file://{tmp_path}"), Directory)


@pytest.mark.parametrize(("url", "module", "package"), [("redis://h", "redis", "redis"), ("s3://b/f", "s3fs", "s3fs")])
def test_a_missing_driver_is_named(url, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    # what fsspec has opened before, it does not import again
    if "fsspec.registry" in sys.modules:
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ModuleNotFoundError, match=package):
        PrefixStore(url)


def test_a_locked_index_is_waited_for(store):
    put_chain(store, chain(1))
    other = sqlite3.connect(Path(store.url) / "index.sqlite", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, other.rollback).start()
    assert None not in put_chain(store, chain(3, 5))
    other.close()


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    """`examples/benchmarks/sequential_robustness.py kill` does it 200 times."""
    for seed, seconds in enumerate((0.0, 0.03, 0.11)):
        counts = kill_a_writer(tmp_path, seed, seconds)
        assert counts["acknowledged"] >= 1 and counts["whole"] >= counts["acknowledged"]
        assert counts["lost"] == counts["damaged"] == 0


def test_processes_that_read_and_write_at_once_agree(tmp_path):
    """`examples/benchmarks/sequential_robustness.py processes`: eight of them, two minutes."""
    totals = competitors(str(tmp_path), processes=3, seconds=2.0)
    assert totals["ended"] == 3 and totals["read"] > 0 and totals["written"] > 0
    assert totals["wrong"] == totals["not_stored"] == totals["failures"] == 0
    with PrefixStore(tmp_path, page_size=8) as store:
        assert store.verify()[1] == []
