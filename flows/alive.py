"""Whether a run is at work: each holds a lock of its own, ``.overnight/runs/RUN.lock``, as long as its process lives.

A process number says nothing about a run in another container or on another machine; a lock on the shared volume does.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Holds the lock at ``path`` during the block; waits for another attempt at the same run that still has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # What the run starts does not inherit it: it tells of this process alone.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether some living process holds the lock at ``path``."""
    try:
        with path.open("rb") as file:
            # Shared and for a moment: an attempt that starts just now waits for it.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
