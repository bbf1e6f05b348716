"""What a training process does when it is told to end (SIGTERM): a spot machine is taken away, or the run is stopped.

The signal only leaves a note. The processes agree at the end of a step that one of them has it, save a checkpoint of
that same step, and end. Who is stuck in a step, be it in a collective that waits for another process for ever, ends
without after ``stop_seconds``: the last checkpoint is there. Before there are processes, nothing has to be left.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

from tasks.errors import EXIT_STOPPED, EXIT_TRY_AGAIN


class Stop:
    """Whether this process was told to end."""

    def __init__(self) -> None:
        self.told = False


def end_at_once(*_: object) -> NoReturn:
    """Ends this process, the launcher of a training that has no other ones yet, in a line: a handler of SIGTERM."""
    # Past Python's own buffer, in the middle of which the signal may have come.
    os.write(2, b"error: told to end (SIGTERM) while no process was at work. Run again.\n")
    # Not by an exception, which an import that tries something may take for its own.
    os._exit(EXIT_TRY_AGAIN)


@contextlib.contextmanager
def noted(seconds: float) -> Iterator[Stop]:
    """Yields a :class:`Stop`, which SIGTERM sets. The block has ``seconds`` from then on, or the process ends."""
    stop, left = Stop(), threading.Event()
    awake, wake = os.pipe()
    os.set_blocking(wake, False)

    def watch() -> None:
        # A thread, because a handler in Python waits for the main one, which may sit in a collective.
        while numbers := os.read(awake, 64):
            if signal.SIGTERM in numbers:
                stop.told = True
                if not left.wait(seconds):
                    os._exit(EXIT_STOPPED)
        os.close(awake)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    other = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="stopping", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        left.set()
        signal.set_wakeup_fd(other)
        signal.signal(signal.SIGTERM, before)
        os.close(wake)
        watcher.join()
