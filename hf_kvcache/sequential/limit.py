"""Keeping a store below a limit, by removing the pages that are worth least."""

from __future__ import annotations

import time
from collections.abc import Collection

from hf_kvcache.sequential import eviction
from hf_kvcache.sequential.backends import Backend, Entry


class Limit:
    """The bytes that a store may have.

    Args:
        backend: where the pages lie.
        most: bytes.
    """

    def __init__(self, backend: Backend, most: int) -> None:
        self.backend, self.most = backend, most

    def make_room(self, size: int, keep: Collection[str] = ()) -> str:
        """Sees to it that `size` more bytes stay below the limit; returns why that cannot be, nothing when it can.

        Args:
            size: bytes of a page.
            keep: keys of pages that must stay.
        """
        if size > self.most:
            return f"limit_bytes={self.most} is smaller than one page of {size} bytes; nothing can be stored"
        shrink(self.backend, self.most - size, keep, wholly=True)
        total = self.backend.total()
        if total + size > self.most:
            return (
                f"limit_bytes={self.most} leaves no room for a page of {size} bytes: of the {total} bytes there are, "
                "too many are pinned or cannot be read here, with another secret for example; nothing is removed and "
                "nothing more is stored, let go of pins or raise the limit"
            )
        return ""


def shrink(backend: Backend, limit: int, keep: Collection[str] = (), wholly: bool = False) -> list[Entry]:
    """Removes the pages that are worth least until `limit` bytes are left; returns them.

    Args:
        backend: where the pages lie.
        limit: bytes.
        keep: keys of pages that must stay, beside those that are pinned.
        wholly: remove nothing where so few bytes cannot be reached, instead of all that may be removed.
    """
    excess = backend.total() - limit
    if excess <= 0:
        return []
    gone, freed = [], 0
    for entry in eviction.cheapest(list(backend.entries()), {*backend.pins().values(), *keep}, time.time()):
        if freed >= excess:
            break
        gone.append(entry)
        freed += entry.size
    if wholly and freed < excess:
        return []
    for entry in gone:
        backend.delete(entry.key, entry.parent)
    return gone
