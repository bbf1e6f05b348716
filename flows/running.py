"""What the run at work does now, for whoever asks meanwhile: ``.overnight/running.json``.

DVC cannot be asked while a stage works, because it holds the stage's files. A run that ends removes the file; one that
was stopped or died leaves it, and it then says where that was.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.watch import StageRun
from tasks import atomic, paths
from tasks.errors import DiskFull
from tasks.progress import Event

RUNNING = paths.SCRATCH / "running.json"
_SECONDS_BETWEEN_WRITES = 1.0


class StageNow(BaseModel):
    """What is known of one stage of the run at work. ``progress`` is its last report, in words."""

    model_config = ConfigDict(frozen=True)

    stage: str
    state: Literal["waiting", "running", "ran", "cached", "skipped", "failed"] = "waiting"
    since: datetime | None = None
    message: str = ""
    progress: str = ""


class Running(BaseModel):
    """The run at work; ``stages`` is empty until the graph has been read."""

    model_config = ConfigDict(frozen=True)

    run: str
    pid: int
    started: datetime
    stages: tuple[StageNow, ...] = ()

    def at_work(self) -> StageNow | None:
        """Returns the stage that works, or that worked when the run died."""
        return next((stage for stage in self.stages if stage.state == "running"), None)


def read(root: Path) -> Running | None:
    """Returns what the run at work says of itself, or the last one that did not come to its end."""
    try:
        return Running.model_validate_json((root / RUNNING).read_bytes())
    except (OSError, ValidationError):
        return None


@contextlib.contextmanager
def record(root: Path, run: str) -> Iterator["Record"]:
    """Yields the record of ``run``, which is at work until the block ends; an exception leaves the file for later."""
    yield (kept := Record(root, run))
    kept.remove()


class Record:
    """Follows a run and keeps its file. A full disk is the run's concern: nothing here fails because of one."""

    def __init__(self, root: Path, run: str) -> None:
        self._file = root / RUNNING
        self._now = Running(run=run, pid=os.getpid(), started=_now())
        self._written = 0.0
        self._write()

    def plan(self, stages: Iterable[str]) -> None:
        """Names the stages of the run, in order."""
        self._now = self._now.model_copy(update={"stages": tuple(StageNow(stage=name) for name in stages)})
        self._write()

    def began(self, stage: str) -> None:
        self._set(StageNow(stage=stage, state="running", since=_now()))

    def event(self, event: Event) -> None:
        if event.notice:
            return
        stage = next((one for one in self._now.stages if one.stage == event.stage), None)
        if stage is None:
            return
        told = f"{event.step} {event.done:,.0f}/{event.total:,.0f} {event.unit}"
        left = event.seconds_left()
        if left is not None and event.done < event.total:
            told += f", {left:,.0f} s left"
        self._set(stage.model_copy(update={"progress": told, "message": ""}), lazily=True)

    def retrying(self, stage: str, message: str, attempt: int, seconds: float) -> None:
        self._set(StageNow(stage=stage, state="running", since=_now(), message=f"{message}; attempt {attempt}"))

    def ended(self, run: StageRun) -> None:
        self._set(StageNow(stage=run.stage, state=run.outcome, since=_now(), message=run.message))

    def remove(self) -> None:
        """Says that the run has come to its end."""
        self._file.unlink(missing_ok=True)

    def _set(self, stage: StageNow, lazily: bool = False) -> None:
        stages = tuple(stage if one.stage == stage.stage else one for one in self._now.stages)
        self._now = self._now.model_copy(update={"stages": stages})
        if not lazily or time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError, DiskFull):
            atomic.write_json(self._file, self._now.model_dump(mode="json"))
        self._written = time.monotonic()


def _now() -> datetime:
    return datetime.now().astimezone()
