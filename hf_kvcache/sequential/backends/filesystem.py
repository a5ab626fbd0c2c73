"""`FileSystem`: pages as objects of any file system that fsspec knows, S3 and GCS among them. For many machines.

    <url>/pages/<parent>/<key>.<head>     one object a page; head is its first token

An object is written whole or not at all, which is what S3 and the like promise, and two writers of one page write the
same. There is no index: a page behind a known parent is found by its name, and one that forks by a list of the parent's
folder. Hits are not counted there.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from hf_kvcache.sequential.backends.backend import Entry
from hf_kvcache.sequential.identity import require_key
from hf_kvcache.sequential.packing import PageError, UnreadablePage
from hf_kvcache.sequential.record import summary

NAME = re.compile(r"([0-9a-f]{64})\.([0-9]+)")
MOST_CHILDREN = 16


class FileSystem:
    """Pages in an object store.

    Args:
        url: `protocol://bucket/folder`.
        secret: with which pages are signed.
        options: for the file system of fsspec (`key`, `secret`, `endpoint_url`, ...).
    """

    # drivers of object stores raise their own kinds, which have nothing in common
    failures: ClassVar[tuple[type[Exception], ...]] = (Exception,)

    def __init__(self, url: str, secret: bytes = b"", options: Mapping[str, Any] | None = None) -> None:
        try:
            import fsspec
        except ImportError:
            raise ModuleNotFoundError(f"the store {url} needs fsspec; pip install fsspec") from None
        self.secret = secret
        try:
            # what other processes write must be seen: listings are not to be remembered
            self.files, folder = fsspec.core.url_to_fs(url, use_listings_cache=False, **(options or {}))
        except ImportError as error:
            raise ModuleNotFoundError(f"the store {url} needs a driver that is not installed: {error}") from None
        self.pages, self.names = f"{folder.rstrip('/')}/pages", f"{folder.rstrip('/')}/pins"

    def write(self, entry: Entry, data: bytes) -> None:
        self.files.makedirs(self._folder(entry.parent), exist_ok=True)
        self.files.pipe_file(f"{self._folder(entry.parent)}/{require_key(entry.key)}.{int(entry.ids[0])}", data)

    def read(self, key: str, parent: str) -> bytes | None:
        path = self._find(key, parent)
        try:
            return None if path is None else self.files.cat_file(path)
        except FileNotFoundError:
            return None

    def contains(self, key: str, parent: str) -> bool:
        return self._find(key, parent) is not None

    def children(self, parent: str, head: int) -> list[tuple[str, np.ndarray | None]]:
        found = [key for key, first, _ in self._list(parent) if first == head]
        return [(key, None) for key in found[:MOST_CHILDREN]]

    def used(self, keys: Iterable[tuple[str, str]]) -> None:
        """Object stores do not count."""

    def delete(self, key: str, parent: str) -> None:
        path = self._find(key, parent)
        if path is not None:
            self._remove(path)

    def entries(self) -> Iterator[Entry]:
        for path in self._all():
            try:
                yield summary(self.files.cat_file(path), self.secret)
            except (PageError, FileNotFoundError):
                continue

    def total(self) -> int:
        return sum(int(info["size"]) for info in self._all(detail=True).values())

    def pins(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.files.cat_file(self.names)))
        except FileNotFoundError:
            return {}

    def pin(self, name: str, key: str | None) -> None:
        kept = {other: held for other, held in self.pins().items() if other != name}
        if key is not None:
            kept[name] = require_key(key)
        self.files.pipe_file(self.names, json.dumps(kept).encode())

    def collect(self) -> tuple[int, list[tuple[str, UnreadablePage]]]:
        """Removes objects that are not whole pages."""
        freed, unreadable = 0, []
        for path in self._all():
            try:
                data = self.files.cat_file(path)
            except FileNotFoundError:
                # somebody else has removed it since
                continue
            try:
                summary(data, self.secret)
            except UnreadablePage as error:
                unreadable.append((path.rpartition("/")[2].partition(".")[0], error))
            except PageError:
                self._remove(path)
                freed += len(data)
        return freed, unreadable

    def close(self) -> None:
        """Nothing is open."""

    def _folder(self, parent: str) -> str:
        return f"{self.pages}/{require_key(parent)}"

    def _list(self, parent: str) -> list[tuple[str, int, str]]:
        """(key, first token, path) of the pages behind `parent`."""
        try:
            paths = self.files.ls(self._folder(parent), detail=False)
        except FileNotFoundError:
            return []
        names = ((NAME.fullmatch(path.rpartition("/")[2]), path) for path in paths)
        return [(match[1], int(match[2]), path) for match, path in names if match]

    def _find(self, key: str, parent: str) -> str | None:
        require_key(key)
        return next((path for found, _, path in self._list(parent) if found == key), None)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(path)

    def _all(self, detail: bool = False) -> Any:
        try:
            return self.files.find(self.pages, detail=detail)
        except FileNotFoundError:
            return {}
