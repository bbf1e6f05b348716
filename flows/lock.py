"""One run at a time in a project: a lock that is held until the last process of the run is gone."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from flows import supervise
from tasks import paths
from tasks.errors import TryAgain

LOCK = paths.SCRATCH / "run.lock"
# The supervisors of a run that was killed end its processes within this time, and hold the lock meanwhile.
_SECONDS_TO_DIE = supervise.STAGE_GRACE_SECONDS + 7.0
_SECONDS_UNTOLD = 3.0
_SECONDS_BETWEEN_TRIES = 0.1


class Holder(BaseModel):
    """Who holds the lock."""

    model_config = ConfigDict(frozen=True)

    pid: int
    run: str
    since: datetime

    @property
    def alive(self) -> bool:
        """Whether its process still runs, somebody else's too."""
        try:
            # A killed one that its parent has not yet asked for is a zombie, whom a signal would still find.
            return str(psutil.Process(self.pid).status()) != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


class Held(TryAgain):
    """Another run holds the lock. The message says which, since when, and what to do."""


@contextlib.contextmanager
def hold(
    root: Path,
    run: str,
    wait: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    file: Path = LOCK,
    advice: str = "Wait until it has ended, or run `overnight run --wait`.",
) -> Iterator[int]:
    """Holds the lock of the project at ``root`` and yields its file descriptor.

    A process that inherits the descriptor holds the lock too. Raises :class:`Held`, with ``advice``, when another run
    is at work, or with ``wait`` tells so and waits. A run that was killed is waited for in any case: its processes are
    gone in seconds, or when its training has written a checkpoint, which is told.
    """
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _acquire(descriptor, wait, tell, advice)
        os.ftruncate(descriptor, 0)
        this = Holder(pid=os.getpid(), run=run, since=datetime.now().astimezone())
        os.pwrite(descriptor, json.dumps(this.model_dump(mode="json")).encode(), 0)
        yield descriptor
        # Whoever comes next need not wonder whether this process still lives.
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def holder(root: Path, file: Path = LOCK) -> Holder | None:
    """Returns the run at work in the project at ``root``; None also while it has not yet written its name."""
    try:
        with (root / file).open("rb") as locked:
            try:
                # Shared and for a moment: a run that starts just now tries again.
                fcntl.flock(locked, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read(locked.fileno())
    except FileNotFoundError:
        pass
    return None


def _acquire(descriptor: int, wait: bool, tell: Callable[[str], object], advice: str) -> None:
    started = time.monotonic()
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            held_by = _read(descriptor)
        dying = (held_by is None or not held_by.alive) and time.monotonic() - started < _SECONDS_TO_DIE
        if not wait and not dying:
            raise Held(f"{_describe(held_by)} {advice}")
        if wait and not told:
            tell(f"{_describe(held_by)} Waiting for it to end.")
            told = True
        elif dying and not told and time.monotonic() - started > _SECONDS_UNTOLD:
            tell("what was at work here has ended, and its training still writes a checkpoint; waiting for that.")
            told = True
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder.model_validate_json(os.pread(descriptor, 4096, 0))
    except ValidationError:
        # It has just taken the lock and not yet written its name.
        return None


def _describe(holder: Holder | None) -> str:
    if holder is None:
        return "another run is at work in this project."
    return (
        f"run {holder.run} (process {holder.pid}) is at work in this project since "
        f"{holder.since.astimezone():%Y-%m-%d %H:%M:%S}."
    )
