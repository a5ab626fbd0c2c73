"""Keeping a store below a limit, by removing the pages that are worth least.

To list pages, and to add up their bytes, takes as long as there are pages. So the bytes are counted along and added up
now and then, since others write too; and when the limit is passed, more is removed than has to be.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from hf_kvcache.sequential import eviction
from hf_kvcache.sequential.backends import Backend, Entry

# of the limit: what may be written before the bytes are added up again
UNSEEN = 0.01
# of what may be removed: what goes at once
AHEAD = 0.1
# seconds for which a store where no room was found is not searched again
PATIENCE = 10.0


class Limit:
    """The bytes that a store may have. Of several that write at once, each can exceed it by a hundredth.

    Args:
        backend: where the pages lie.
        most: bytes.
    """

    def __init__(self, backend: Backend, most: int) -> None:
        self.backend, self.most = backend, most
        # bytes when they were last added up, and those that room was made for since
        self._seen, self._since = most + 1, 0
        self._full_until = 0.0

    def make_room(self, size: int, keep: Collection[str] = ()) -> str:
        """Sees to it that `size` more bytes stay below the limit; returns why that cannot be, nothing when it can.

        Args:
            size: bytes of a page that is written next.
            keep: keys of pages that must stay.
        """
        if size > self.most:
            return f"limit_bytes={self.most} is smaller than one page of {size} bytes; nothing can be stored"
        if self._since > UNSEEN * self.most or not self._fits(size):
            self._look()
            if not self._fits(size) and time.monotonic() >= self._full_until:
                self.free(size, keep)
                self._look()
                self._full_until = 0.0 if self._fits(size) else time.monotonic() + PATIENCE
        if not self._fits(size):
            return (
                f"limit_bytes={self.most} leaves no room for a page of {size} bytes: of the {self._seen} bytes there "
                "are, too many are pinned or cannot be read here, with another secret for example; nothing is removed "
                "and nothing more is stored, let go of pins or raise the limit"
            )
        self._since += size
        return ""

    def free(self, size: int = 0, keep: Collection[str] = ()) -> list[Entry]:
        """Removes pages until there is room for `size` more bytes, and some for those that come next; none where there
        is room, and none where that cannot be reached. Returns them."""
        needed = self.backend.total() + size - self.most
        pages = removable(self.backend, keep) if needed > 0 else []
        most = sum(entry.size for entry in pages)
        return remove(self.backend, pages, max(needed, int(AHEAD * most))) if most >= needed else []

    def _fits(self, size: int) -> bool:
        return self._seen + self._since + size <= self.most

    def _look(self) -> None:
        self._seen, self._since = self.backend.total(), 0


def removable(backend: Backend, keep: Collection[str] = ()) -> list[Entry]:
    """Pages that may go, in the order in which to remove them.

    Args:
        backend: where they lie.
        keep: keys of pages that must stay, beside those that are pinned.
    """
    return list(eviction.cheapest(list(backend.entries()), {*backend.pins().values(), *keep}, time.time()))


def remove(backend: Backend, pages: Sequence[Entry], excess: int) -> list[Entry]:
    """Removes pages, the first ones first, until `excess` bytes are freed; returns them."""
    gone, freed = [], 0
    for entry in pages:
        if freed >= excess:
            break
        backend.delete(entry.key, entry.parent)
        gone.append(entry)
        freed += entry.size
    return gone
