"""Which pages behind a parent begin alike, where objects can only be asked for by name: a trie of small objects.

    <url>/branches/<parent>/<key of a beginning>     ids of one page that begins so

A list of the pages behind a parent grows with them. So every page leaves its ids under the name of the shortest of its
beginnings that has none yet; the first one behind a parent takes the empty beginning. Walking down, every step names a
page that shares more tokens than the one before, and the last one shares as many as any: had another one parted
later, its branch would be under the next name. How many steps there are depends on how often pages part along the way:
once or twice for prompts, the logarithm of the number of pages on average where they part everywhere.

This is an index and nothing more. Two writers at once can hide each other's branch, and pages that are removed leave
theirs; then a prompt shares less of its last page, until `gc` asks `repair` what to write.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from hf_kvcache.sequential.identity import common_prefix, page_key

# name -> ids
Branches = Mapping[str, np.ndarray]
# steps of a look-up
MOST_STEPS = 16


def walk(
    parent: str, ids: np.ndarray, look: Callable[[str], np.ndarray | None], most: int | None = None
) -> tuple[list[np.ndarray], str | None]:
    """Goes down the branches behind `parent` along `ids`.

    Args:
        parent: key of the page before.
        ids: tokens to follow.
        look: the branch of a name, None where there is none.
        most: steps; None for as many as there are.

    Returns:
        ids of the pages on the way, each sharing more than the one before, and the name where a page of these ids has
        to leave its branch; None where it needs none or the steps were too many.
    """
    met: list[np.ndarray] = []
    known = 0
    while known <= len(ids) and (most is None or len(met) < most):
        name = page_key(parent, ids[:known])
        found = look(name)
        shared = -1 if found is None else common_prefix(found, ids)
        if found is None or shared < known:
            # one that does not begin as its name says is damaged, and is written again
            return met, name
        met.append(found)
        known = shared + 1
    return met, None


def repair(parent: str, pages: Collection[np.ndarray], branches: Branches) -> tuple[Branches, set[str]]:
    """What to write and which names to remove so that all of `pages`, and none else, are found.

    Nothing, where all of them are: whoever checks a store need not be allowed to write.

    Args:
        parent: key of the page before.
        pages: ids of the pages that are there.
        branches: that are there.
    """
    alive = {page_key(parent, ids) for ids in pages}
    whole = all(page_key(parent, ids) in alive for ids in branches.values())
    # a branch that goes may be the way to others, so all are made anew
    wanted = dict(branches) if whole else {}
    for ids in sorted(pages, key=len, reverse=True):
        _, name = walk(parent, ids, wanted.get)
        if name is not None:
            wanted[name] = ids
    changed = {name: ids for name, ids in wanted.items() if not np.array_equal(branches.get(name, ()), ids)}
    return changed, set(branches) - set(wanted)
