"""Branches of pages that are asked for by name: the longest match in few steps, and what is repaired."""

import numpy as np
import pytest

from hf_kvcache.sequential.backends.branches import MOST_STEPS, repair, walk
from hf_kvcache.sequential.identity import common_prefix, page_key

PARENT = "ab" * 32


def texts(count, letters=2, length=16, seed=0):
    """Different texts of few letters, which part everywhere, in random order."""
    choose = np.random.default_rng(seed)
    found = np.unique(choose.integers(0, letters, (count, length)).astype(np.uint32), axis=0)
    return list(choose.permutation(found))


def planted(pages):
    branches = {}
    for ids in pages:
        _, name = walk(PARENT, ids, branches.get)
        if name is not None:
            branches[name] = ids
    return branches


def best(pages, ids):
    return max((common_prefix(page, ids) for page in pages), default=0)


@pytest.mark.parametrize("letters", [2, 5, 1000])
def test_the_last_step_shares_as_many_tokens_as_any(letters):
    pages = texts(300, letters)
    branches = planted(pages)
    # one object a page at most
    assert len(branches) <= len(pages)
    for ids in [*texts(100, letters, seed=1), *texts(100, letters, length=7, seed=2)]:
        met, _ = walk(PARENT, ids, branches.get, MOST_STEPS)
        lengths = [common_prefix(page, ids) for page in met]
        assert lengths == sorted(set(lengths)) and lengths[-1] == best(pages, ids)


def test_steps_do_not_grow_with_the_pages():
    steps = {}
    for count in (1, 1000, 10000):
        branches, query = planted(texts(count, letters=1000)), np.full(16, 5000, np.uint32)
        steps[count] = len(walk(PARENT, query, branches.get)[0])
    assert steps == {1: 1, 1000: 1, 10000: 1}
    # where pages part along the whole way, it is the logarithm of their number on average
    branches = planted(texts(10000))
    counts = [len(walk(PARENT, ids, branches.get)[0]) for ids in texts(500, seed=1)]
    assert np.mean(counts) < np.log(10000) and max(counts) <= MOST_STEPS


def test_a_look_up_ends_after_so_many_steps():
    """The worst order: every page shares one token more than the one before."""
    last = np.arange(64, dtype=np.uint32)
    pages = [np.concatenate([last[:count], np.full(64 - count, 99, np.uint32)]) for count in range(64)]
    asked = []
    branches = planted(pages)
    met, name = walk(PARENT, last, lambda own: asked.append(own) or branches.get(own), MOST_STEPS)
    assert len(asked) == len(met) == MOST_STEPS and name is None


def test_nothing_is_repaired_where_all_is_found():
    pages = texts(100)
    assert repair(PARENT, pages, planted(pages)) == ({}, set())
    assert repair(PARENT, [], {}) == ({}, set())


@pytest.mark.parametrize("damage", ["gone pages", "lost branches", "empty", "wrong"])
def test_what_is_repaired_leads_to_all_pages_and_no_others(damage):
    pages, kept = texts(100), texts(100)
    branches = planted(pages)
    names = list(branches)[::3]
    for name in names:
        if damage == "gone pages":
            kept = [ids for ids in kept if not np.array_equal(ids, branches[name])]
        elif damage == "lost branches":
            del branches[name]
        else:
            branches[name] = np.empty(0, np.uint32) if damage == "empty" else np.full(16, 7, np.uint32)
    changed, needless = repair(PARENT, kept, branches)
    assert changed or needless
    mended = {name: ids for name, ids in {**branches, **changed}.items() if name not in needless}
    own = {page_key(PARENT, ids) for ids in kept}
    assert {page_key(PARENT, ids) for ids in mended.values()} <= own
    for ids in texts(100, seed=1):
        met, _ = walk(PARENT, ids, mended.get)
        assert common_prefix(met[-1], ids) == best(kept, ids)
    assert repair(PARENT, kept, mended) == ({}, set())


def test_a_short_page_that_a_longer_one_begins_with_needs_no_branch():
    longer = texts(1)[0]
    branches = planted([longer])
    assert walk(PARENT, longer[:5], branches.get)[1] is None
    assert walk(PARENT, longer, branches.get)[1] is None
    # the other way round it needs one
    assert walk(PARENT, longer, planted([longer[:5]]).get)[1] is not None
