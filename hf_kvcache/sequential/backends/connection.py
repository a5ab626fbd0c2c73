"""`Connection`: SQLite for many threads, one at a time, and for the processes that fork from this one.

A connection must not be used on both sides of a fork, and a lock that another thread holds at that moment stays locked
in the child for ever. So a child takes new locks, leaves what it inherited alone, and opens its own. The process that
forks waits for nothing and closes nothing.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Connection:
    """A connection that is opened when it is needed.

    Args:
        opened: opens it.
    """

    def __init__(self, opened: Callable[[], sqlite3.Connection]) -> None:
        self._opened = opened
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None
        CONNECTIONS.add(self)

    @property
    def closed(self) -> bool:
        """Whether nothing is open."""
        return self._database is None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone; what is changed is changed all together."""
        with self._lock:
            if self._database is None:
                self._database = self._opened()
            with self._database as database:
                yield database

    def close(self) -> None:
        """Lets go of the file until it is needed again."""
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._database = None

    def in_child(self) -> None:
        """Begins anew in the child."""
        self._lock = threading.RLock()
        if self._database is not None:
            # never to be closed here: that would wait for the statement of a thread which is not there
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._database))
            self._database = None


CONNECTIONS: weakref.WeakSet[Connection] = weakref.WeakSet()


def _in_child() -> None:
    for connection in list(CONNECTIONS):
        connection.in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
