"""`Connection`: SQLite for many threads, one at a time, and for the processes that fork from this one.

SQLite forbids to carry a connection over a fork, and a lock that another thread holds at that moment stays locked in
the child for ever. So connections are closed before a fork, and opened again by who needs them next.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# seconds that a fork waits for a statement to end
PATIENCE = 1.0


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

    def before_fork(self) -> bool:
        """Closes it and keeps others from it; False where a statement takes too long, which may wait for a process."""
        held = self._lock.acquire(timeout=PATIENCE)
        if held:
            self.close()
        return held

    def after_fork(self) -> None:
        """Goes on in the process that forked, where `before_fork` was true."""
        self._lock.release()

    def in_child(self) -> None:
        """Begins anew in the child."""
        self._lock = threading.RLock()
        if self._database is not None:
            # never to be closed here: that would wait for the statement of a thread which is not there
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._database))
            self._database = None


CONNECTIONS: weakref.WeakSet[Connection] = weakref.WeakSet()


class Fork(threading.local):
    """What a thread has to undo after its fork; others may fork at the same time."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.held: list[Connection] = []

    def before(self) -> None:
        self.connections = list(CONNECTIONS)
        self.held = [connection for connection in self.connections if connection.before_fork()]

    def after(self) -> None:
        for connection in self.held:
            connection.after_fork()
        self.connections, self.held = [], []

    def in_child(self) -> None:
        for connection in self.connections:
            connection.in_child()
        self.connections, self.held = [], []


if hasattr(os, "register_at_fork"):
    _fork = Fork()
    os.register_at_fork(before=_fork.before, after_in_parent=_fork.after, after_in_child=_fork.in_child)
