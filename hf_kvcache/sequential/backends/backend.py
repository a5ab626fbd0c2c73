"""The interface of a backend, and which one a URL means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hf_kvcache.sequential.packing import UnreadablePage


@dataclass(frozen=True)
class Entry:
    """What a store knows of a page without reading it.

    Args:
        key, parent: of the page; the parent of a first page is the root of its identity.
        ids: its token ids.
        start: the position of the first.
        codec: its name.
        size: bytes of the file.
        created, used: seconds since the epoch.
        hits: how often it was adopted, where the backend counts.
        seconds: that its prefill took.
        information: -log2 of the probability that the model gave its tokens; None where no logits were at hand.
        model: fingerprint of the model.
    """

    key: str
    parent: str
    ids: np.ndarray
    start: int
    codec: str
    size: int
    created: float
    used: float = 0.0
    hits: int = 0
    seconds: float = 0.0
    information: float | None = None
    model: str = ""

    @classmethod
    def of_header(cls, header: dict[str, Any], ids: np.ndarray, size: int) -> Entry:
        """From a page file."""
        names = ("key", "parent", "start", "codec", "created", "seconds", "information", "model")
        return cls(ids=ids, size=size, used=header["created"], **{name: header[name] for name in names})


@dataclass(frozen=True)
class Collected:
    """What a backend found when it cleaned up.

    Args:
        freed: bytes that were removed.
        damaged: names of the pages among it.
        unreadable: keys of pages that are not among the entries because they cannot be read here, and why.
    """

    freed: int = 0
    damaged: Sequence[str] = ()
    unreadable: Sequence[tuple[str, UnreadablePage]] = ()


def blob_of_ids(ids: np.ndarray) -> bytes:
    """Token ids as an index keeps them."""
    return np.asarray(ids, dtype="<u4").tobytes()


def ids_of_blob(data: Any) -> np.ndarray | None:
    """What `blob_of_ids` was given; None for anything else, since an index can be damaged."""
    if not isinstance(data, bytes) or not data or len(data) % 4:
        return None
    return np.frombuffer(data, dtype="<u4")


class Backend(Protocol):
    """A place that holds pages. Any number of processes may use one place at once.

    A page is bytes; what they mean is not the backend's business. Failures are whatever the driver raises: the store
    turns them into misses.
    """

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What the driver raises when the place cannot be used."""
        ...

    def write(self, entry: Entry, data: bytes) -> None:
        """Stores a page, all of it or nothing. When this returns, the page survives the end of the process."""
        ...

    def read(self, key: str, parent: str) -> bytes | None:
        """The bytes of a page, None when it is not there."""
        ...

    def contains(self, key: str, parent: str) -> bool: ...

    def nearest(self, parent: str, ids: np.ndarray) -> list[np.ndarray]:
        """Ids of pages behind `parent`, one that shares most tokens with `ids` among them.

        Asks a server as often for thousands of such pages as for one. An index may be behind, so what it names need not
        be there any more.
        """
        ...

    def used(self, keys: Iterable[tuple[str, str]]) -> None:
        """Counts a hit of each (key, parent)."""
        ...

    def delete(self, key: str, parent: str) -> None:
        """Removes a page; does nothing when it is gone already."""
        ...

    def entries(self) -> Iterator[Entry]:
        """All pages."""
        ...

    def total(self) -> int:
        """Bytes of all pages."""
        ...

    def pins(self) -> dict[str, str]:
        """Names that users gave, and the key of the page that each holds on to."""
        ...

    def pin(self, name: str, key: str | None) -> None:
        """Makes `name` hold on to `key`; None lets go."""
        ...

    def collect(self) -> Collected:
        """Removes what interrupted writes left behind, and what is damaged where the entries do not name it."""
        ...

    def reindex(self, entries: Sequence[Entry]) -> None:
        """Makes `nearest` find these pages, which are all that this reader knows of, and none that are gone."""
        ...

    def close(self) -> None: ...


def open_backend(url: str | Path, secret: bytes = b"", options: dict[str, Any] | None = None) -> Backend:
    """The backend behind a folder or URL: `redis://...`, any URL that fsspec knows (`s3://bucket/folder`), a folder.

    Raises:
        ModuleNotFoundError: when the driver for a URL is not installed; the text names the package.
        ValueError: for a URL that no driver knows, or options that its driver does not take.
    """
    text, options = str(url), options or {}
    scheme = text.partition("://")[0] if "://" in text else ""
    if scheme in ("redis", "rediss", "unix"):
        from hf_kvcache.sequential.backends.redis_server import RedisServer

        return RedisServer(text, secret, options)
    if scheme and scheme != "file":
        from hf_kvcache.sequential.backends.filesystem import FileSystem

        return FileSystem(text, secret, options)
    from hf_kvcache.sequential.backends.directory import Directory

    if set(options) - {"durable"}:
        raise ValueError(
            f"a store in a folder takes the option durable, got {', '.join(options)}; "
            "drivers of URLs take others, s3://bucket/folder for example endpoint_url"
        )
    return Directory(text.removeprefix("file://"), secret, **options)
