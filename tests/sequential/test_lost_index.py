"""A folder whose index was lost, or never knew of a file: the files are the truth."""

import errno
import shutil
from pathlib import Path

import pytest

from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import IDENTITY, chain, ids_of, put_chain


def opened(folder, **options):
    return PrefixStore(folder, page_size=8, **options)


def lose_index(folder):
    for path in folder.glob("index.sqlite*"):
        path.unlink()


def keys_of(store):
    return sorted(entry.key for entry in store.entries())


@pytest.fixture
def pages():
    return chain(4)


@pytest.fixture
def keys(tmp_path, pages):
    """Of pages in a folder without an index."""
    with opened(tmp_path) as store:
        found = put_chain(store, pages)
    lose_index(tmp_path)
    return found


def test_a_store_without_its_index_is_not_empty(tmp_path, pages, keys):
    with opened(tmp_path) as store:
        assert [match.length for match in store.match(IDENTITY, ids_of(pages)[:12])] == [8, 4]
        assert keys_of(store) == sorted(keys)
        assert store.backend.total() == sum(path.stat().st_size for path in tmp_path.glob("pages/*/*"))
    lose_index(tmp_path)
    with opened(tmp_path) as store, opened(tmp_path / "copy") as other:
        assert store.export(other) == 4


def test_a_limit_holds_without_the_index(tmp_path, keys):
    limit = sum(path.stat().st_size for path in tmp_path.glob("pages/*/*"))
    with opened(tmp_path, limit_bytes=limit) as store:
        put_chain(store, chain(2, 1))
    assert sum(path.stat().st_size for path in tmp_path.glob("pages/*/*")) <= limit


def test_an_index_whose_making_was_interrupted_is_completed(tmp_path, keys):
    with opened(tmp_path) as store:
        store.backend._run("DELETE FROM pages WHERE key = ?", (keys[2],))
        store.backend._run("PRAGMA user_version = 0")
        store.backend.used([(keys[0], "")])
    with opened(tmp_path) as store:
        assert keys_of(store) == sorted(keys)
        # what it knew it still knows
        assert [entry.hits for entry in store.entries() if entry.key == keys[0]] == [1]


def test_every_tenant_finds_its_pages_again(tmp_path, keys):
    """Whoever opens a folder first enters what he can read."""
    with opened(tmp_path, secret=b"a") as one:
        own = put_chain(one, chain(3, 1))
    lose_index(tmp_path)
    with opened(tmp_path) as store, opened(tmp_path, secret=b"a") as one:
        assert keys_of(store) == sorted(keys)
        assert keys_of(one) == sorted(keys + own)
    for _ in range(2):
        with opened(tmp_path) as store:
            assert keys_of(store) == sorted(keys + own)


def test_a_damaged_file_without_an_entry_is_named_and_removed(tmp_path, keys):
    path = next(tmp_path.glob(f"pages/*/{keys[1]}"))
    path.write_bytes(path.read_bytes()[:-7])
    astray = tmp_path / "pages" / "ab" / keys[0]
    astray.parent.mkdir()
    shutil.copy(next(tmp_path.glob(f"pages/*/{keys[0]}")), astray)
    with opened(tmp_path) as store:
        whole, damaged = store.verify()
        assert whole == 3 and sorted(damaged) == sorted([keys[0], keys[1]])
        assert not path.exists() and not astray.exists()
        assert store.verify() == (3, [])


def test_a_file_that_cannot_be_read_keeps_what_is_behind_it(tmp_path, keys, monkeypatch):
    read = Path.read_bytes

    def fail(path):
        if path.name == keys[1]:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch, opened(tmp_path) as store:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.warns(RuntimeWarning, match="Input/output error"):
            assert store.gc() == 0
    with opened(tmp_path) as store:
        assert keys_of(store) == sorted(keys)


def test_damaged_objects_are_named(tmp_path):
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    store = opened(f"local://{tmp_path}")
    keys = put_chain(store, chain(3))
    path = next(tmp_path.glob(f"pages/*/{keys[1]}"))
    path.write_bytes(path.read_bytes()[:-7])
    assert store.verify() == (2, [keys[1]])
    assert not path.exists()
