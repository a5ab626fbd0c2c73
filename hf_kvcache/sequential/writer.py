"""`Writer`: tasks that run in order in the background, bounded by the bytes that wait."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable

# bytes of keys and values that may wait to be written, in the memory of the host; what comes beyond is dropped and not
# waited for, since a page that is not stored costs a prefill some time, and a run that waits for a disk costs it now
MOST_WAITING = 2 << 30
# seconds after which who waits looks whether the thread still runs
PATIENCE = 1.0


class Writer:
    """Runs tasks one after the other, in a daemon thread that is there as long as there are tasks; finished at exit.

    The thread does not wait for more: it would hold the store, and what that has open, until the process ends, also
    when nobody else knows the store any more.

    Args:
        failed: is told of what a task raises; the next task runs all the same, also where this raises itself (a warning
            that the user made an error).
        most_waiting: bytes that may wait.
    """

    def __init__(self, failed: Callable[[BaseException], None], most_waiting: int = MOST_WAITING) -> None:
        self.failed, self.most_waiting = failed, most_waiting
        self._reset()
        WRITERS.add(self)

    def submit(self, task: Callable[[], None], size: int, ahead: Callable[[], None] | None = None) -> bool:
        """Takes a task that holds `size` bytes; False when too many bytes wait already.

        Args:
            task: to run.
            size: bytes.
            ahead: what to do at once where others are before the task. One that comes first begins right away, and
                does it in the background.
        """
        if self._process != os.getpid():
            # threads do not survive a fork
            self._reset()
        with self._changed:
            if self._waiting and self._waiting + size > self.most_waiting:
                return False
            first = not self._accepted
            self._waiting += size
            self._accepted += 1
        try:
            if not first and ahead is not None:
                # where it fails, the task tries again, and what that raises is said
                with contextlib.suppress(Exception):
                    ahead()
        finally:
            with self._changed:
                self._tasks.append((task, size))
                self._start()
        return True

    def flush(self) -> None:
        """Waits for all tasks."""
        if self._process == os.getpid():
            with self._changed:
                while self._accepted:
                    self._start()
                    self._changed.wait(PATIENCE)

    def close(self) -> None:
        """Waits for all tasks and for the end of the thread. What is submitted later is run as before."""
        self.flush()
        thread = self._thread
        if thread is not None and self._process == os.getpid():
            thread.join()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Callable[[], None], int]] = deque()
        self._thread: threading.Thread | None = None
        # tasks and bytes from when they are accepted until they have run
        self._accepted = self._waiting = 0
        self._process = os.getpid()

    def _start(self) -> None:
        """Sees to it that the thread runs; whoever waits for one that has died waits for ever."""
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="hf_kvcache-writer", daemon=True)
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    self._thread = None
                    return
                task, size = self._tasks[0]
            try:
                task()
            except BaseException as error:
                # whoever flushes waits for this thread, so nothing may end it
                with contextlib.suppress(BaseException):
                    self.failed(error)
            # lets go of the pages before those who wait for it go on
            del task
            with self._changed:
                self._tasks.popleft()
                self._accepted -= 1
                self._waiting -= size
                self._changed.notify_all()


WRITERS: weakref.WeakSet[Writer] = weakref.WeakSet()


@atexit.register
def flush_all() -> None:
    """Finishes what is left when the process ends."""
    for writer in list(WRITERS):
        writer.flush()
