"""Which pages to let go of.

A page is worth (seconds that computing it again takes x expected reuses a second) / bytes. The rate is the paper's
prior-guided rule as smoothing: observed hits, plus a prior count that falls with the information of the page, over its
age plus a prior age. After a few hits the counts decide; the model's prior on a long text is next to nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise

from hf_kvcache.sequential.backends import Entry
from hf_kvcache.sequential.backends.backend import blob_of_ids

# the prior: this many hits, over this many seconds
PRIOR_HITS, PRIOR_SECONDS = 1.0, 3600.0
# bits beyond which the model's probability says nothing more
MOST_BITS = 20.0


def reuse_rate(entry: Entry, now: float) -> float:
    """Expected adoptions a second."""
    bits = MOST_BITS if entry.information is None else min(entry.information, MOST_BITS)
    return (entry.hits + PRIOR_HITS * 2**-bits) / (max(now - entry.created, 0.0) + PRIOR_SECONDS)


def worth(entry: Entry, now: float) -> float:
    """What a byte of a page is worth: seconds of prefill that it can be expected to save, a second."""
    return max(entry.seconds, 1e-9) * reuse_rate(entry, now) / max(entry.size, 1)


def references(entries: Collection[Entry], pinned: Collection[str] = ()) -> dict[str, int]:
    """How many pages and pins hold on to every page."""
    counts = {entry.key: int(entry.key in pinned) for entry in entries}
    for entry in entries:
        if entry.parent in counts:
            counts[entry.parent] += 1
    return counts


def cheapest(entries: Sequence[Entry], pinned: Collection[str], now: float) -> Iterator[Entry]:
    """Pages in the order in which to remove them: the least worth first, a page never before those behind it."""
    counts = references(entries, pinned)
    by_key = {entry.key: entry for entry in entries}
    heap = [(worth(entry, now), entry.used, entry.key) for entry in entries if not counts[entry.key]]
    heapq.heapify(heap)
    while heap:
        entry = by_key[heapq.heappop(heap)[2]]
        yield entry
        parent = by_key.get(entry.parent)
        if parent is not None:
            counts[parent.key] -= 1
            if not counts[parent.key]:
                heapq.heappush(heap, (worth(parent, now), parent.used, parent.key))


def needless(entries: Sequence[Entry], pinned: Collection[str], page_size: int) -> Iterator[Entry]:
    """Tails that a longer page with the same beginning stands for, and pages whose predecessors are gone."""
    longer = _begun(entries)
    reached: set[str] = set()
    for entry in sorted(entries, key=lambda entry: entry.start):
        if entry.start == 0 or entry.parent in reached:
            reached.add(entry.key)
    for entry in entries:
        tail = len(entry.ids) < page_size and entry.key in longer
        if entry.key not in pinned and (tail or entry.key not in reached):
            yield entry


def _begun(entries: Iterable[Entry]) -> set[str]:
    """Keys of pages with whose ids a longer one behind the same parent begins.

    In the order of the bytes, all that begin with a page come right after it.
    """
    ordered = sorted((entry.parent, blob_of_ids(entry.ids), entry.key) for entry in entries)
    return {
        key
        for (parent, ids, key), (other, after, _) in pairwise(ordered)
        if parent == other and len(after) > len(ids) and after.startswith(ids)
    }
