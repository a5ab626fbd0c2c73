"""`Directory`: pages as files of a local folder, with an index in SQLite. The default; needs no server.

    <folder>/pages/ab/ab12...     one file a page, named by its key
    <folder>/index.sqlite         what is known of every page, for everything but reading one

A page is written beside its place, flushed to the disk, renamed into it and only then entered in the index; that is the
moment it counts as stored. A process that dies before leaves at most a file without an entry, which is as good as any
other, or a scratch file, which `collect` removes. Whether a page is there is asked of the files, not of the index: a
lost index costs nothing but counts, and is rebuilt from the pages.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from hf_kvcache.sequential.backends.backend import Entry, blob_of_ids, ids_of_blob
from hf_kvcache.sequential.backends.connection import Connection
from hf_kvcache.sequential.identity import require_key
from hf_kvcache.sequential.packing import PageError, UnreadablePage
from hf_kvcache.sequential.record import summary

# seconds to wait for another process's transaction
PATIENCE = 60
# seconds after which a scratch file belongs to nobody
ABANDONED = 600
MOST_CHILDREN = 64

TABLES = """
CREATE TABLE IF NOT EXISTS pages (
    key TEXT PRIMARY KEY, parent TEXT NOT NULL, head INTEGER NOT NULL, ids BLOB NOT NULL, start INTEGER NOT NULL,
    codec TEXT NOT NULL, size INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL, hits INTEGER NOT NULL,
    seconds REAL NOT NULL, information REAL, model TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS children ON pages (parent, head);
CREATE TABLE IF NOT EXISTS pins (name TEXT PRIMARY KEY, key TEXT NOT NULL) WITHOUT ROWID;
"""
COLUMNS = "key, parent, ids, start, codec, size, created, used, hits, seconds, information, model"


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
        self._index = Connection(self._opened)
        (self.path / "pages").mkdir(parents=True, exist_ok=True)

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
        with self._index.transaction() as database:
            _enter(database, [entry])

    def read(self, key: str, parent: str) -> bytes | None:
        try:
            return self._place(key).read_bytes()
        except FileNotFoundError:
            return None

    def contains(self, key: str, parent: str) -> bool:
        return self._place(key).is_file()

    def nearest(self, parent: str, ids: np.ndarray) -> list[np.ndarray]:
        rows = self._run(
            f"SELECT key, ids FROM pages WHERE parent = ? AND head = ? ORDER BY used DESC LIMIT {MOST_CHILDREN}",
            (parent, int(ids[0])),
        )
        known = [(key, ids_of_blob(blob)) for key, blob in rows]
        read = [entry.ids for key, own in known if own is None for entry in self._entry_of_page(key)]
        return [own for _, own in known if own is not None] + read

    def used(self, keys: Iterable[tuple[str, str]]) -> None:
        now = time.time()
        rows = [(now, key) for key, _ in keys]
        with self._index.transaction() as database:
            database.executemany("UPDATE pages SET hits = hits + 1, used = ? WHERE key = ?", rows)

    def delete(self, key: str, parent: str) -> None:
        # the entry first: dying in between leaves a page that is whole, not an entry without one
        self._run("DELETE FROM pages WHERE key = ?", (require_key(key),))
        self._place(key).unlink(missing_ok=True)

    def entries(self) -> Iterator[Entry]:
        for row in self._run(f"SELECT {COLUMNS} FROM pages ORDER BY created"):
            named = dict(zip(COLUMNS.split(", "), row, strict=True))
            ids = ids_of_blob(named["ids"])
            if ids is None:
                yield from self._entry_of_page(named["key"])
            else:
                yield Entry(**{**named, "ids": ids})

    def total(self) -> int:
        return int(self._run("SELECT COALESCE(SUM(size), 0) FROM pages")[0][0])

    def pins(self) -> dict[str, str]:
        return dict(self._run("SELECT name, key FROM pins"))

    def pin(self, name: str, key: str | None) -> None:
        if key is None:
            self._run("DELETE FROM pins WHERE name = ?", (name,))
        else:
            self._run("INSERT OR REPLACE INTO pins VALUES (?, ?)", (name, require_key(key)))

    def collect(self) -> tuple[int, list[tuple[str, UnreadablePage]]]:
        """Removes scratch files that nobody writes any more, and enters pages that the index does not know."""
        known = {row[0] for row in self._run("SELECT key FROM pages")}
        freed, found, unreadable = self._strangers(known)
        with self._index.transaction() as database:
            _enter(database, found)
        for key in known:
            if not self._place(key).exists():
                self._run("DELETE FROM pages WHERE key = ?", (key,))
        return freed, unreadable

    def reindex(self, entries: Sequence[Entry]) -> None:
        """What `collect` enters and `delete` removes, `nearest` finds."""

    def close(self) -> None:
        self._index.close()

    def _place(self, key: str) -> Path:
        return self.path / "pages" / require_key(key)[:2] / key

    def _entry_of_page(self, key: str) -> list[Entry]:
        """What the page itself says, where the index says what cannot be."""
        try:
            return _entry_of(self._place(key), self.secret)
        except UnreadablePage:
            return []

    def _strangers(self, known: set[str]) -> tuple[int, list[Entry], list[tuple[str, UnreadablePage]]]:
        """Files that are not known: the bytes of scratch files, which are removed, pages, and those of others."""
        freed, found, unreadable = 0, [], []
        for path in (self.path / "pages").glob("*/*"):
            if path.name.startswith("."):
                freed += _remove_abandoned(path)
            elif path.name not in known:
                try:
                    found += _entry_of(path, self.secret)
                except UnreadablePage as error:
                    unreadable.append((path.name, error))
        return freed, found, unreadable

    def _run(self, statement: str, values: tuple = ()) -> list[tuple]:
        with self._index.transaction() as database:
            return database.execute(statement, values).fetchall()

    def _opened(self) -> sqlite3.Connection:
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            return self._rebuilt()

    def _open(self) -> sqlite3.Connection:
        index = self.path / "index.sqlite"
        writable = os.access(self.path, os.W_OK)
        url = f"{index.as_uri()}?mode=rwc" if writable else f"{index.as_uri()}?mode=ro&immutable=1"
        connection = sqlite3.connect(url, PATIENCE, uri=True, check_same_thread=False)
        try:
            if writable:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA synchronous = {'FULL' if self.durable else 'NORMAL'}")
                connection.executescript(TABLES)
            # a damaged file is found out here
            connection.execute("SELECT COUNT(*) FROM pages").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _rebuilt(self) -> sqlite3.Connection:
        """Puts a damaged index aside and makes one anew from the pages."""
        for suffix in ("", "-wal", "-shm"):
            path = self.path / f"index.sqlite{suffix}"
            if path.exists():
                path.replace(self.path / f"damaged-{os.getpid()}-index.sqlite{suffix}")
        database = self._open()
        with database:
            _enter(database, self._strangers(set())[1])
        return database


def _enter(database: sqlite3.Connection, entries: Iterable[Entry]) -> None:
    """Has an index know of pages."""
    rows = [
        (
            entry.key,
            require_key(entry.parent),
            int(entry.ids[0]),
            blob_of_ids(entry.ids),
            *(entry.start, entry.codec, entry.size, entry.created, entry.used, entry.hits),
            *(entry.seconds, entry.information, entry.model),
        )
        for entry in entries
    ]
    database.executemany(f"INSERT OR REPLACE INTO pages VALUES ({', '.join('?' * 13)})", rows)


def _entry_of(path: Path, secret: bytes) -> list[Entry]:
    """The entry of a page file, in a list; empty when it is not a good one.

    Raises:
        UnreadablePage: when it is a good one for somebody else.
    """
    try:
        entry = summary(path.read_bytes(), secret)
        return [entry] if entry.key == path.name else []
    except UnreadablePage:
        raise
    except (OSError, PageError):
        return []


def _remove_abandoned(path: Path) -> int:
    """Removes a scratch file that nobody writes any more; returns its bytes."""
    try:
        found = path.stat()
    except FileNotFoundError:
        # its writer has just put it in its place
        return 0
    if time.time() - found.st_mtime <= ABANDONED:
        return 0
    path.unlink(missing_ok=True)
    return found.st_size


def _flush_folder(path: Path) -> None:
    """Makes a rename survive a crash of the machine, where the system can do it."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
