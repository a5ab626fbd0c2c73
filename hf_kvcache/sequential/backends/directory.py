"""`Directory`: pages as files of a local folder, with an index in SQLite. The default; needs no server.

    <folder>/pages/ab/ab12...     one file a page, named by its key
    <folder>/index.sqlite         what is known of every page, for everything but reading one

A page is written beside its place, flushed to the disk, renamed into it and only then entered in the index; that is the
moment it counts as stored. A process that dies before leaves at most a file without an entry, which is as good as any
other, or a scratch file, which `collect` removes. Whether a page is there is asked of the files, not of the index: a
lost index costs nothing but counts and pins, and is rebuilt from the pages when the folder is opened.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from hf_kvcache.sequential.backends import index
from hf_kvcache.sequential.backends.backend import Collected, Entry, blob_of_ids, ids_of_blob
from hf_kvcache.sequential.backends.connection import Connection
from hf_kvcache.sequential.identity import require_key
from hf_kvcache.sequential.packing import PageError, UnreadablePage
from hf_kvcache.sequential.record import summary

# seconds after which a scratch file belongs to nobody
ABANDONED = 600
# neighbours on each side: the nearest may be gone, or its entry damaged
BESIDE = 2


@dataclass
class Strangers:
    """What lies in a folder and is not in its index.

    Args:
        pages: that can be entered.
        damaged: files that are no whole pages, or not in their place.
        unreadable: keys of pages that cannot be read here, and why.
    """

    pages: list[Entry] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    unreadable: list[tuple[str, UnreadablePage]] = field(default_factory=list)


class Directory:
    """Pages in a local folder.

    Args:
        path: of the folder; made when it is not there.
        secret: with which pages are signed.
        durable: wait for the disk before a page counts as stored. Without, a crash of the machine, but not of the
            process, may lose pages; damaged ones are still recognised.
    """

    failures: ClassVar[tuple[type[Exception], ...]] = (OSError, sqlite3.Error)

    def __init__(self, path: str | Path, secret: bytes = b"", durable: bool = True) -> None:
        self.path, self.secret, self.durable = Path(path).absolute(), secret, durable
        # who reads does not wait for who writes, who may wait for other processes
        self._writing, self._reading = Connection(self._opened), Connection(self._opened_to_read)
        try:
            (self.path / "pages").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            # of the kind that it is, in words that say what the folder was for
            raise type(error)(
                error.errno, f"a store of pages needs a folder that it can write to: {error.strerror}", str(self.path)
            ) from None

    def write(self, entry: Entry, data: bytes) -> None:
        place = self._place(entry.key)
        place.parent.mkdir(exist_ok=True)
        scratch = place.with_name(f".{entry.key[:16]}.{os.getpid()}.{threading.get_ident()}")
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                if self.durable:
                    os.fsync(file.fileno())
            scratch.replace(place)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        if self.durable:
            _flush_folder(place.parent)
        with self._writing.transaction() as database:
            index.enter(database, [entry])

    def read(self, key: str, parent: str) -> bytes | None:
        try:
            return self._place(key).read_bytes()
        except FileNotFoundError:
            return None

    def contains(self, key: str, parent: str) -> bool:
        return self._place(key).is_file()

    def nearest(self, parent: str, ids: np.ndarray) -> list[np.ndarray]:
        # in the order of the bytes, what shares most lies beside the place that the ids themselves would have
        rows = [
            row
            for side, order in (("<=", "DESC"), (">", "ASC"))
            for row in self._read(
                f"SELECT key, ids FROM pages WHERE parent = ? AND ids {side} ? ORDER BY ids {order} LIMIT {BESIDE}",
                (parent, blob_of_ids(ids)),
            )
        ]
        known = [(key, ids_of_blob(blob)) for key, blob in rows]
        read = [entry.ids for key, own in known if own is None for entry in self._entry_of_page(key)]
        return [own for _, own in known if own is not None] + read

    def used(self, keys: Iterable[tuple[str, str]]) -> None:
        now = time.time()
        rows = [(now, key) for key, _ in keys]
        with self._writing.transaction() as database:
            database.executemany("UPDATE pages SET hits = hits + 1, used = ? WHERE key = ?", rows)

    def delete(self, key: str, parent: str) -> None:
        # the entry first: dying in between leaves a page that is whole, not an entry without one
        self._run("DELETE FROM pages WHERE key = ?", (require_key(key),))
        self._place(key).unlink(missing_ok=True)

    def entries(self) -> Iterator[Entry]:
        for row in self._read(f"SELECT {index.COLUMNS} FROM pages ORDER BY created"):
            named = dict(zip(index.COLUMNS.split(", "), row, strict=True))
            ids = ids_of_blob(named["ids"])
            if ids is None:
                yield from self._entry_of_page(named["key"])
            else:
                yield Entry(**{**named, "ids": ids})

    def total(self) -> int:
        return int(self._read("SELECT COALESCE(SUM(size), 0) FROM pages")[0][0])

    def pins(self) -> dict[str, str]:
        return dict(self._read("SELECT name, key FROM pins"))

    def pin(self, name: str, key: str | None) -> None:
        if key is None:
            self._run("DELETE FROM pins WHERE name = ?", (name,))
        else:
            self._run("INSERT OR REPLACE INTO pins VALUES (?, ?)", (name, require_key(key)))

    def collect(self) -> Collected:
        """Removes scratch files that nobody writes any more and files that are no pages; enters pages that the index
        does not know."""
        freed = sum(_remove_abandoned(path) for path in (self.path / "pages").glob("*/.*"))
        known = {row[0] for row in self._read("SELECT key FROM pages")}
        found = self._strangers(known)
        for path in found.damaged:
            freed += _remove(path)
        with self._writing.transaction() as database:
            index.enter(database, found.pages, anew=False)
        for key in known:
            if not self._place(key).exists():
                self._run("DELETE FROM pages WHERE key = ?", (key,))
        return Collected(freed, [path.name for path in found.damaged], found.unreadable)

    def reindex(self, entries: Sequence[Entry]) -> None:
        """What `collect` enters and `delete` removes, `nearest` finds."""

    def close(self) -> None:
        self._writing.close()
        self._reading.close()

    def _place(self, key: str) -> Path:
        return self.path / "pages" / require_key(key)[:2] / key

    def _entry_of_page(self, key: str) -> list[Entry]:
        """What the page itself says, where the index says what cannot be; nothing when it is not a good one."""
        try:
            entry = summary(self._place(key).read_bytes(), self.secret)
        except (OSError, PageError):
            return []
        return [entry] if entry.key == key else []

    def _strangers(self, known: Collection[str]) -> Strangers:
        """What the files say that are not known."""
        found = Strangers()
        for path in (self.path / "pages").glob("*/*"):
            entered = path.name in known and path == self._place(path.name)
            if entered or path.name.startswith(".") or not path.is_file():
                continue
            try:
                entry = summary(path.read_bytes(), self.secret)
                good = entry.key == path.name and path == self._place(entry.key)
            except FileNotFoundError:
                # somebody else has removed it since
                continue
            except OSError as error:
                found.unreadable.append((path.name, UnreadablePage(f"the file cannot be read ({error})")))
                continue
            except UnreadablePage as error:
                found.unreadable.append((path.name, error))
                continue
            except PageError:
                good = False
            if good:
                found.pages.append(entry)
            else:
                found.damaged.append(path)
        return found

    def _run(self, statement: str, values: tuple = ()) -> list[tuple]:
        with self._writing.transaction() as database:
            return database.execute(statement, values).fetchall()

    def _read(self, statement: str, values: tuple = ()) -> list[tuple]:
        with self._reading.transaction() as database:
            return database.execute(statement, values).fetchall()

    def _opened(self) -> sqlite3.Connection:
        """The index, which knows of all pages, also where it had been lost."""
        database = index.open_index(self.path, self.durable)
        try:
            if not index.is_complete(database):
                found = self._strangers({row[0] for row in database.execute("SELECT key FROM pages")})
                with database:
                    index.enter(database, found.pages, anew=False)
                    if not found.unreadable:
                        # else those who can read them have to enter them
                        index.complete(database)
        except BaseException:
            database.close()
            raise
        return database

    def _opened_to_read(self) -> sqlite3.Connection:
        if self._writing.closed:
            # which makes the index where it has to be made
            with self._writing.transaction():
                pass
        return index.open_index(self.path, self.durable)


def _remove_abandoned(path: Path) -> int:
    """Removes a scratch file that nobody writes any more; returns its bytes."""
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        # its writer has just put it in its place
        return 0
    return _remove(path) if age > ABANDONED else 0


def _remove(path: Path) -> int:
    """Removes a file; returns its bytes."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        # somebody else has removed it since
        return 0
    return size


def _flush_folder(path: Path) -> None:
    """Makes a rename survive a crash of the machine, where the system can do it."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
