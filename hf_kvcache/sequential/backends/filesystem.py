"""`FileSystem`: pages as objects of any file system that fsspec knows, S3 and GCS among them. For many machines.

    <url>/pages/<parent>/<key>     one object a page
    <url>/branches/...             which pages begin alike, see `branches`
    <url>/pins/<sha256 of a name>  the name, and the key that it holds on to

An object is written whole or not at all, which is what S3 and the like promise, and two writers of one page write the
same. To look a prompt up, objects are asked for by name and nothing is listed, since a list takes as long as it is.
Hits are not counted there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from hf_kvcache.sequential.backends import branches
from hf_kvcache.sequential.backends.backend import Collected, Entry, blob_of_ids, ids_of_blob
from hf_kvcache.sequential.identity import KEY, require_key
from hf_kvcache.sequential.packing import PageError, UnreadablePage
from hf_kvcache.sequential.record import MOST_TOKENS, peek, summary

# bytes that hold what a page of the usual length says of itself, and how many pages are asked for at once
FRONT, AT_ONCE = 8192, 256


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
        except ValueError as error:
            raise ValueError(
                f"no driver opens the store {url}: {error}; pass a folder, redis://... or a URL that fsspec knows, "
                "such as s3://bucket/folder"
            ) from None
        self.folder = folder.rstrip("/")

    def write(self, entry: Entry, data: bytes) -> None:
        self._put(self._path("pages", entry.parent, entry.key), data)
        # after the page, so that what a branch leads to is there
        _, name = branches.walk(entry.parent, entry.ids, partial(self._branch, entry.parent))
        if name is not None:
            self._put(self._path("branches", entry.parent, name), blob_of_ids(entry.ids))

    def read(self, key: str, parent: str) -> bytes | None:
        try:
            return self.files.cat_file(self._path("pages", parent, key))
        except FileNotFoundError:
            return None

    def contains(self, key: str, parent: str) -> bool:
        try:
            # `exists` also says no where the place cannot be asked
            self.files.info(self._path("pages", parent, key))
        except FileNotFoundError:
            return False
        return True

    def nearest(self, parent: str, ids: np.ndarray) -> list[np.ndarray]:
        return branches.walk(parent, ids, partial(self._branch, parent), branches.MOST_STEPS)[0]

    def used(self, keys: Iterable[tuple[str, str]]) -> None:
        """Object stores do not count."""

    def delete(self, key: str, parent: str) -> None:
        self._remove(self._path("pages", parent, key))

    def entries(self) -> Iterator[Entry]:
        sizes = {path: int(info["size"]) for path, info in self._all("pages", detail=True).items()}
        for path, entry in map(self._whole, sizes) if self.secret else self._peeked(sizes):
            if entry is not None and path.endswith(f"/{entry.parent}/{entry.key}"):
                yield entry

    def total(self) -> int:
        return sum(int(info["size"]) for info in self._all("pages", detail=True).values())

    def pins(self) -> dict[str, str]:
        found = {}
        for path in self._all("pins"):
            # one that is let go of meanwhile is none
            with contextlib.suppress(FileNotFoundError):
                pinned = json.loads(self.files.cat_file(path))
                found[pinned["name"]] = pinned["key"]
        return found

    def pin(self, name: str, key: str | None) -> None:
        # an object each: of one that held them all, two processes at once would lose what the other wrote
        path = f"{self.folder}/pins/{hashlib.sha256(name.encode()).hexdigest()}"
        if key is None:
            self._remove(path)
        else:
            self._put(path, json.dumps({"name": name, "key": require_key(key)}).encode())

    def collect(self) -> Collected:
        """Removes objects that are not whole pages in their place."""
        freed, damaged, unreadable = 0, [], []
        for path in self._all("pages"):
            place = tuple(path.split("/")[-2:])
            try:
                data = self.files.cat_file(path)
                entry = summary(data, self.secret)
            except FileNotFoundError:
                # somebody else has removed it since
                continue
            except UnreadablePage as error:
                unreadable.append((place[1], error))
                continue
            except PageError:
                entry = None
            if entry is None or (entry.parent, entry.key) != place:
                self._remove(path)
                freed += len(data)
                damaged.append(place[1])
        return Collected(freed, damaged, unreadable)

    def reindex(self, entries: Sequence[Entry]) -> None:
        known: dict[str, dict[str, np.ndarray]] = {}
        for entry in entries:
            known.setdefault(entry.parent, {})[entry.key] = entry.ids
        # before the pages: who writes meanwhile writes the page first, so a branch here has its page there
        found = self._all_branches()
        there: dict[str, set[str]] = {}
        for parent, key in (path.split("/")[-2:] for path in self._all("pages")):
            there.setdefault(parent, set()).add(key)
        for parent in {*known, *found}:
            pages = known.get(parent, {})
            if there.get(parent, set()) <= set(pages):
                # else there are others, of which it is not known what leads to them
                self._repair(parent, list(pages.values()), found.get(parent, {}))

    def close(self) -> None:
        """Nothing is open."""

    def _peeked(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, Entry | None]]:
        """What pages say of themselves, from their first bytes: a list of pages takes no more than those."""
        paths = list(sizes)
        for first in range(0, len(paths), AT_ONCE):
            some = paths[first : first + AT_ONCE]
            # drivers of object stores ask for them side by side
            fronts = self.files.cat_ranges(some, [0] * len(some), [min(FRONT, sizes[path]) for path in some])
            for path, front in zip(some, fronts, strict=True):
                if isinstance(front, FileNotFoundError):
                    continue
                if isinstance(front, Exception):
                    raise front
                try:
                    yield path, peek(front, sizes[path])
                except UnreadablePage:
                    continue
                except PageError:
                    # what a long page says goes on
                    if len(front) < sizes[path]:
                        yield self._whole(path)

    def _whole(self, path: str) -> tuple[str, Entry | None]:
        """The same from all of a page, which alone shows who signed it."""
        with contextlib.suppress(PageError, FileNotFoundError):
            return path, summary(self.files.cat_file(path), self.secret)
        return path, None

    def _repair(self, parent: str, pages: Sequence[np.ndarray], found: branches.Branches) -> None:
        changed, needless = branches.repair(parent, pages, found)
        for name, ids in changed.items():
            self._put(self._path("branches", parent, name), blob_of_ids(ids))
        for name in needless:
            self._remove(self._path("branches", parent, name))

    def _branch(self, parent: str, name: str) -> np.ndarray | None:
        try:
            # a range: of a whole object drivers ask for the length first
            path = self._path("branches", parent, name)
            return ids_of_blob(self.files.cat_file(path, start=0, end=4 * MOST_TOKENS))
        except FileNotFoundError:
            return None

    def _all_branches(self) -> dict[str, dict[str, np.ndarray]]:
        """By parent and name; those that are damaged have no ids."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for path in self._all("branches"):
            parent, name = path.split("/")[-2:]
            if KEY.fullmatch(parent) and KEY.fullmatch(name):
                ids = self._branch(parent, name)
                found.setdefault(parent, {})[name] = np.empty(0, np.uint32) if ids is None else ids
        return found

    def _path(self, folder: str, parent: str, name: str) -> str:
        return f"{self.folder}/{folder}/{require_key(parent)}/{require_key(name)}"

    def _put(self, path: str, data: bytes) -> None:
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.files.pipe_file(path, data)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(path)

    def _all(self, folder: str, detail: bool = False) -> Any:
        try:
            return self.files.find(f"{self.folder}/{folder}", detail=detail)
        except FileNotFoundError:
            return {}
