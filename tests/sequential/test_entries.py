"""Lists of the pages in an object store: from the first bytes of each, and none believed that is not in its place."""

import pytest

from hf_kvcache.sequential.backends import filesystem
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import chain, put_chain


def opened(folder, **options):
    return PrefixStore(f"local://{folder}", page_size=64, **options)


def keys_of(store):
    return sorted(entry.key for entry in store.entries())


@pytest.fixture
def read(monkeypatch):
    """Bytes that were read, by path."""
    found, plain = {}, opened("/nowhere").backend.files.__class__.cat_file

    def cat_file(self, path, *args, **options):
        data = plain(self, path, *args, **options)
        found[path] = found.get(path, 0) + len(data)
        return data

    monkeypatch.setattr(opened("/nowhere").backend.files.__class__, "cat_file", cat_file)
    return found


def test_a_list_takes_the_first_bytes_of_every_page(tmp_path, read, monkeypatch):
    store, pages = opened(tmp_path), chain(5, tokens=64)
    keys = put_chain(store, pages, seconds=3.0, model="m")
    read.clear()
    entries = sorted(store.entries(), key=lambda entry: entry.start)
    assert [(entry.key, entry.seconds, entry.model, list(entry.ids)) for entry in entries] == [
        (key, 3.0, "m", list(page.ids)) for key, page in zip(keys, pages, strict=True)
    ]
    assert sum(entry.size for entry in entries) == store.backend.total() > 5 * filesystem.FRONT
    assert set(read.values()) == {filesystem.FRONT} and len(read) == 5
    # fewer at once, and pages that say more of themselves than is read at first
    monkeypatch.setattr(filesystem, "AT_ONCE", 2)
    assert keys_of(store) == sorted(keys)
    monkeypatch.setattr(filesystem, "FRONT", 100)
    assert keys_of(store) == sorted(keys)


def test_a_limit_is_kept_by_first_bytes_too(tmp_path, read):
    size = opened(tmp_path / "one").backend
    put_chain(PrefixStore(f"local://{tmp_path / 'one'}", page_size=64), chain(1, tokens=64))
    store = opened(tmp_path / "many", limit_bytes=int(3.5 * size.total()))
    read.clear()
    for seed in range(6):
        put_chain(store, chain(1, seed, tokens=64))
    assert len(keys_of(store)) == 3
    # listed for every page above the limit
    pages = {path: count for path, count in read.items() if "/pages/" in path}
    assert max(pages.values()) <= 6 * filesystem.FRONT


def test_pages_that_are_signed_or_elsewhere_are_not_listed(tmp_path):
    store, signed = opened(tmp_path), opened(tmp_path, secret=b"s")
    keys, own = put_chain(store, chain(2, tokens=64)), put_chain(signed, chain(2, 1, tokens=64))
    assert keys_of(store) == sorted(keys) and keys_of(signed) == sorted(own)
    path = next((tmp_path / "pages").rglob(keys[1]))
    path.rename(path.with_name("0" * 64))
    assert keys_of(store) == keys[:1]
    path.write_bytes(b"no page")
    assert keys_of(store) == keys[:1]


def test_objects_that_are_removed_meanwhile_are_no_failure(tmp_path, monkeypatch):
    store = opened(tmp_path)
    put_chain(store, chain(2))
    found = store.backend._all

    def listed(folder, detail=False):
        path = f"{tmp_path}/{folder}/{'0' * 64}/{'1' * 64}"
        return {**found(folder, detail=True), path: {"size": 9}} if detail else [*found(folder), path]

    monkeypatch.setattr(store.backend, "_all", listed)
    assert store.verify() == (2, [])
    store.backend.delete("1" * 64, "0" * 64)
