"""The look-up: the longest chain of pages that a prompt begins with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_kvcache.sequential.backends import Backend
from hf_kvcache.sequential.identity import common_prefix, page_key


@dataclass(frozen=True)
class Match:
    """A page that a prompt begins with.

    Args:
        key, parent: of the page.
        start: the position of its first token.
        length: how many of its tokens the prompt shares; fewer than it has at a fork.
    """

    key: str
    parent: str
    start: int
    length: int


def extend(found: list[Match], backend: Backend, root: str, ids: np.ndarray, page_size: int, forked: int) -> None:
    """Adds what follows the whole pages that are `found` already; the last page may be shared in part.

    Args:
        found: pages behind each other, none at first.
        backend: to ask.
        root: the key before the first page.
        ids: the prompt.
        page_size: tokens of a whole page.
        forked: tokens of the longest page of which a part counts.
    """
    parent, start = (found[-1].key, found[-1].start + page_size) if found else (root, 0)
    while len(ids) - start >= page_size:
        key = page_key(parent, ids[start : start + page_size])
        if not backend.contains(key, parent):
            break
        found.append(Match(key, parent, start, page_size))
        parent, start = key, start + page_size
    fork = _fork(backend, parent, start, ids[start : start + page_size], forked)
    if fork is not None:
        found.append(fork)


def _fork(backend: Backend, parent: str, start: int, rest: np.ndarray, longest: int) -> Match | None:
    """The page behind `parent` of up to `longest` tokens that shares most of them with `rest`, in part; None when none
    shares any."""
    found = backend.nearest(parent, rest) if len(rest) else []
    shared = [(common_prefix(ids, rest), ids) for ids in found if len(ids) <= longest]
    for length, ids in sorted(shared, key=lambda pair: pair[0], reverse=True):
        # an index is not signed and may be behind: believed is what there is a page for, by the hash of its ids
        key = page_key(parent, ids)
        if length and backend.contains(key, parent):
            return Match(key, parent, start, length)
    return None
