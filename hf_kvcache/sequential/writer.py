"""`Writer`: one background thread that runs tasks in order, bounded by the bytes that wait."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable

# bytes of keys and values that may wait to be written
MOST_WAITING = 2 << 30


class Writer:
    """Runs tasks one after the other. A daemon thread, started when it is first needed, and finished at exit.

    Args:
        failed: is told of what a task raises; the next task runs all the same, also where this raises itself (a warning
            that the user made an error).
        most_waiting: bytes that may wait.
    """

    def __init__(self, failed: Callable[[BaseException], None], most_waiting: int = MOST_WAITING) -> None:
        self.failed, self.most_waiting = failed, most_waiting
        self._thread: threading.Thread | None = None
        self._reset()
        reference = weakref.ref(self)
        atexit.register(_flush_at_exit, reference)

    def submit(self, task: Callable[[], None], size: int) -> bool:
        """Takes a task that holds `size` bytes; False when too many bytes wait already."""
        if self._process != os.getpid():
            # threads do not survive a fork
            self._reset()
        with self._lock:
            if self._waiting and self._waiting + size > self.most_waiting:
                return False
            self._start()
            self._waiting += size
        self._tasks.put((task, size))
        return True

    def flush(self) -> None:
        """Waits for all tasks."""
        if self._process == os.getpid():
            with self._lock:
                if self._tasks.unfinished_tasks:
                    self._start()
            self._tasks.join()

    def close(self) -> None:
        """Waits for all tasks and ends the thread."""
        self.flush()
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive() and self._process == os.getpid():
            self._tasks.put((None, 0))
            thread.join()

    def _reset(self) -> None:
        self._tasks: queue.Queue[tuple[Callable[[], None] | None, int]] = queue.Queue()
        self._lock = threading.Lock()
        self._thread = None
        self._waiting, self._process = 0, os.getpid()

    def _start(self) -> None:
        """Sees to it that the thread runs; whoever waits for one that has died waits for ever."""
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="hf_kvcache-writer", daemon=True)
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        tasks = self._tasks
        while True:
            task, size = tasks.get()
            try:
                if task is None:
                    return
                task()
            except BaseException as error:
                # whoever flushes waits for this thread, so nothing may end it
                with contextlib.suppress(BaseException):
                    self.failed(error)
            finally:
                # lets go of the pages before it waits for the next
                task = None
                with self._lock:
                    self._waiting -= size
                tasks.task_done()


def _flush_at_exit(reference: weakref.ref[Writer]) -> None:
    writer = reference()
    if writer is not None:
        writer.flush()
