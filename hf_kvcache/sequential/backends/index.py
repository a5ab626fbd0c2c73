"""The index of a folder in SQLite: its tables, and whether it knows of all pages that are there.

An index that was just made knows of none, and one whose making was interrupted of some; the version, set last, tells.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from hf_kvcache.sequential.backends.backend import Entry, blob_of_ids
from hf_kvcache.sequential.identity import require_key

# seconds to wait for another process's transaction
PATIENCE = 60
VERSION = 1

COLUMNS = "key, parent, ids, start, codec, size, created, used, hits, seconds, information, model"
# by `beside`, the pages behind a parent lie in the order of the bytes of their ids
TABLES = """
CREATE TABLE IF NOT EXISTS pages (
    key TEXT PRIMARY KEY, parent TEXT NOT NULL, ids BLOB NOT NULL, start INTEGER NOT NULL, codec TEXT NOT NULL,
    size INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL, hits INTEGER NOT NULL, seconds REAL NOT NULL,
    information REAL, model TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS beside ON pages (parent, ids);
CREATE TABLE IF NOT EXISTS pins (name TEXT PRIMARY KEY, key TEXT NOT NULL) WITHOUT ROWID;
"""
# for the tables of before, which had the first token in a column
CONVERSION = f"""
BEGIN IMMEDIATE;
ALTER TABLE pages RENAME TO former;
{TABLES.split(";")[0]};
INSERT INTO pages SELECT {COLUMNS} FROM former;
DROP TABLE former;
COMMIT;
"""


def open_index(folder: Path, durable: bool) -> sqlite3.Connection:
    """Opens the index of a folder, makes it where there is none, and puts one aside that is damaged."""
    try:
        return _open(folder, durable)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            # no damage: it is locked, or nothing may be opened there
            raise
    for suffix in ("", "-wal", "-shm"):
        path = folder / f"index.sqlite{suffix}"
        if path.exists():
            path.replace(folder / f"damaged-{os.getpid()}-index.sqlite{suffix}")
    return _open(folder, durable)


def is_complete(database: sqlite3.Connection) -> bool:
    """Whether an index knows of all pages; one that cannot be written stays as it is, and counts as complete."""
    writable = not database.execute("PRAGMA query_only").fetchone()[0]
    return not writable or database.execute("PRAGMA user_version").fetchone()[0] == VERSION


def complete(database: sqlite3.Connection) -> None:
    """Notes that an index knows of all pages."""
    database.execute(f"PRAGMA user_version = {VERSION}")


def enter(database: sqlite3.Connection, entries: Iterable[Entry], anew: bool = True) -> None:
    """Has an index know of pages.

    Args:
        database: the index.
        entries: of the pages.
        anew: also where it knows of them already.
    """
    rows = [
        (
            entry.key,
            require_key(entry.parent),
            blob_of_ids(entry.ids),
            *(entry.start, entry.codec, entry.size, entry.created, entry.used, entry.hits),
            *(entry.seconds, entry.information, entry.model),
        )
        for entry in entries
    ]
    otherwise = "REPLACE" if anew else "IGNORE"
    database.executemany(f"INSERT OR {otherwise} INTO pages VALUES ({', '.join('?' * 12)})", rows)


def _open(folder: Path, durable: bool) -> sqlite3.Connection:
    index = folder / "index.sqlite"
    writable = os.access(folder, os.W_OK)
    url = f"{index.as_uri()}?mode=rwc" if writable else f"{index.as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(url, PATIENCE, uri=True, check_same_thread=False)
    try:
        if writable:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            if "head" in [column[1] for column in connection.execute("PRAGMA table_info(pages)")]:
                connection.executescript(CONVERSION)
            connection.executescript(TABLES)
        else:
            connection.execute("PRAGMA query_only = ON")
        # a damaged file is found out here
        connection.execute("SELECT COUNT(*) FROM pages").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection
