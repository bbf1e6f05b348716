"""The records of runs, ``.overnight/runs/RUN.json``.

A record is written when a run begins and after each stage, so that one whose process died says where that was. Records
of nights lie in the project, though a night works in a worktree.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows import alive
from flows.watch import Outcome, StageRun
from tasks import atomic, paths
from tasks.errors import DiskFull, TryAgain, UserMistake
from tasks.progress import Event

RUNS = paths.SCRATCH / "runs"
# What is told of a night that has died before it had a record.
UNBEGUN = "nothing of it was begun, and the next night does its work"
_MOST_NAMED = 5
# Bytes that are enough for a record, which holds a line for each stage.
_ROOM = 16 * 1024
_ENDED = ("completed", "unchanged", "refused", "skipped")
_HOW = {
    "Terminated": "terminated (SIGTERM)",
    "TerminationSignal": "terminated (SIGTERM)",
    "KeyboardInterrupt": "interrupted (Ctrl-C)",
    # What Prefect makes of a signal, or of somebody who cancels the run.
    "CancelledError": "told to end",
    "SystemExit": "told to end",
    # Nobody reads any more what it says: the runner of a night was killed.
    "BrokenPipeError": "whoever ran it was gone",
}

State = Literal["running", "completed", "unchanged", "refused", "skipped", "failed", "stopped", "killed"]


class StageRecord(BaseModel):
    """How one stage of a run ended; ``outcome`` is None while it works. ``seconds`` of wall clock."""

    model_config = ConfigDict(frozen=True)

    stage: str
    outcome: Outcome | None = None
    seconds: float = 0.0
    message: str = ""


class Run(BaseModel):
    """One run, as far as it is known.

    ``worktree`` is where a night works, relative to the project; None for a run in place. ``flow_run`` is its id in
    Prefect, ``pid`` the process that works on it, or did last. ``reason``: why it failed, was refused or skipped, or
    what it waits for. ``told``: whoever wants to know how it ended has heard.
    """

    model_config = ConfigDict(frozen=True)

    run: str
    # Its place among the project's runs, and that of the present attempt at it among the attempts at all of them: a
    # clock that is put right may go back behind the start of an earlier one.
    number: int = 0
    attempt: int = 0
    flow_run: str | None = None
    pid: int
    started: datetime
    # When the present attempt began.
    since: datetime
    ended: datetime | None = None
    state: State = "running"
    from_stage: str | None = None
    force: bool = False
    commit: str | None = None
    worktree: Path | None = None
    # A night works in a worktree and publishes; a run by hand works in place.
    night: bool = False
    # The digest of params.yaml as it was when the present attempt began; a night's stands in its commit.
    params: str | None = None
    # Stages that earlier attempts at this run have finished: forced ones are not forced once more. And those that they
    # had begun: their checkpoints are this run's own.
    finished: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    version: str | None = None
    reason: str = ""
    # Of a night that failed: the code with which a command ends that works on it, None where a bug ended it.
    exit_code: int | None = None
    # Of a record from before this was written down nobody needs to hear.
    told: bool = True
    # Whether its process lived when the record was read.
    alive: bool = Field(default=False, exclude=True)

    @property
    def condition(self) -> str:
        """Its state, or ``killed`` when it should be running and its process is gone."""
        return self.state if self.state != "running" or self.alive else "killed"

    @property
    def can_go_on(self) -> bool:
        """Whether `overnight rerun` has something to finish."""
        return self.condition in ("failed", "stopped", "killed")

    @property
    def seconds(self) -> float | None:
        """Its duration, up to now while it works; None when nobody knows when it died, or the clock was put back."""
        until = self.ended or (_now() if self.alive else None)
        seconds = (until - self.started).total_seconds() if until is not None else None
        return seconds if seconds is not None and seconds >= 0 else None

    @property
    def last_stage(self) -> StageRecord | None:
        """The stage that failed, or else the last one that was begun."""
        failed = [stage for stage in self.stages if stage.outcome == "failed"]
        if failed:
            return failed[0]
        return self.stages[-1] if self.stages else None


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What earlier attempts at a run have done: stages that they ``finished``, and those that they had ``begun``."""

    finished: frozenset[str] = frozenset()
    begun: frozenset[str] = frozenset()


class NoSuchRun(UserMistake):
    """No run has this name. The message names those that there are."""


def read(root: Path) -> tuple[Run, ...]:
    """Returns the runs of the project at ``root``, the newest last."""
    found = []
    for file in (root / RUNS).glob("[!.]*.json"):
        with contextlib.suppress(ValidationError, OSError):
            found.append(_load(file))
    return tuple(sorted(found, key=lambda run: (run.number, run.started, run.run)))


def last_at_work(root: Path) -> Run | None:
    """Returns the run at which somebody worked last; a night that was skipped did no work. None where there is none."""
    worked = (run for run in read(root) if run.state != "skipped")
    return max(worked, key=lambda run: (run.attempt, run.since), default=None)


def in_place(root: Path) -> Run | None:
    """Returns the run that is at work in the project's own folder, as no night is; None where there is none."""
    return next((run for run in read(root) if run.alive and not run.night), None)


def find(root: Path, name: str) -> Run:
    """Returns the run ``name``, of which the beginning is enough when only one begins so. Raises :class:`NoSuchRun`."""
    known = read(root)
    found = [run for run in known if run.run == name] or [run for run in known if run.run.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise NoSuchRun(f"'{name}' is the beginning of {len(found)} runs: {', '.join(run.run for run in found)}.")
    names = ", ".join(run.run for run in known[-_MOST_NAMED:])
    raise NoSuchRun(f"there is no run '{name}'; " + (f"the last ones are {names}." if names else "there is none yet."))


class Record:
    """Follows a run and keeps its file. A full disk is the run's concern: nothing here fails because of one.

    Room to say how the run ended is kept from its beginning on, in a hidden file beside the record.
    """

    def __init__(self, root: Path, run: Run, resumed: Resumed) -> None:
        self._root, self.run, self.resumed = root, run, resumed
        self._room = root / RUNS / f".{run.run}.room"
        self._write()
        if run.state == "running":
            self._keep_room()

    def set(self, **changed: object) -> None:
        """Changes fields of :class:`Run`."""
        self.run = self.run.model_copy(update=changed)
        self._write()

    def end(self, state: State, reason: str = "", version: str | None = None) -> None:
        """Says how the run ended; ``reason`` is one line."""
        self.set(state=state, reason=reason, version=version or self.run.version, ended=_now())

    def began(self, stage: str) -> None:
        # One works at a time: what had begun before and has not ended had nothing to do.
        self.run = self.run.model_copy(update={"stages": tuple(one for one in self.run.stages if one.outcome)})
        self._stage(StageRecord(stage=stage))

    def event(self, event: Event) -> None:
        pass

    def retrying(self, stage: str, message: str, attempt: int, seconds: float) -> None:
        self._stage(StageRecord(stage=stage, message=f"{message}; attempt {attempt}"))

    def ended(self, run: StageRun) -> None:
        self._stage(
            StageRecord(stage=run.stage, outcome=run.outcome, seconds=round(run.seconds, 1), message=run.message)
        )

    def _stage(self, stage: StageRecord) -> None:
        others = tuple(one for one in self.run.stages if one.stage != stage.stage)
        self.set(stages=(*others, stage))

    def _write(self) -> None:
        file = self._root / RUNS / f"{self.run.run}.json"
        ended = self.run.state != "running"
        with contextlib.suppress(OSError, DiskFull):
            try:
                atomic.write_json(file, self.run.model_dump(mode="json"))
            except DiskFull:
                if not ended:
                    # The end will say this too.
                    return
                self._fill_room()
                os.replace(self._room, file)
            if ended:
                self._room.unlink(missing_ok=True)

    def _keep_room(self) -> None:
        with contextlib.suppress(OSError), self._room.open("ab") as kept:
            # An attempt that died has left it; what was begun on a full disk is less than that.
            kept.write(b" " * (_ROOM - kept.tell()))
            kept.flush()
            os.fsync(kept.fileno())

    def _fill_room(self) -> None:
        # What a power failure may cut off here has not yet taken the place of the record.
        with self._room.open("r+b") as kept:
            kept.write(self.run.model_dump_json(indent=2).encode())
            kept.truncate()
            kept.flush()
            os.fsync(kept.fileno())


@contextlib.contextmanager
def attempt(root: Path, name: str, **known: object) -> Iterator[Record]:
    """Yields the record of the run ``name`` as :func:`begin` does; an exception says in it that the run was stopped."""
    with alive.hold(root / RUNS / f"{name}.lock"):
        record = begin(root, name, **known)
        try:
            yield record
        except (UserMistake, TryAgain) as error:
            record.end("failed", str(error))
            raise
        except BaseException as error:
            at_work = record.run.last_stage
            where = f" at {at_work.stage}" if at_work is not None and at_work.outcome is None else ""
            record.end("stopped", f"{_HOW.get(type(error).__name__, type(error).__name__)}{where}")
            raise


def begin(root: Path, name: str, **known: object) -> Record:
    """Returns the record of the run ``name``, which begins now, or goes on when there is one of that name already.

    ``known`` are fields of :class:`Run`. A run that had come to its end, or of which something else is asked now
    (``from_stage``, ``force``), begins anew.
    """
    now, known_runs = _now(), read(root)
    if (before := recall(root, name)) is None:
        number = 1 + max((run.number for run in known_runs), default=0)
        before = Run(run=name, number=number, pid=os.getpid(), started=now, since=now)
    asked = before.model_copy(update=known)
    finished = {*before.finished, *(stage.stage for stage in before.stages if stage.outcome == "ran")}
    begun = {*before.begun, *(stage.stage for stage in before.stages if stage.outcome in (None, "failed"))} - finished
    if before.state in _ENDED or (asked.from_stage, asked.force) != (before.from_stage, before.force):
        finished = begun = set()
    fresh: dict[str, object] = {
        "pid": os.getpid(), "since": now, "ended": None, "state": "running", "reason": "", "exit_code": None,
        "stages": (), "told": False, "finished": tuple(sorted(finished)), "begun": tuple(sorted(begun)),
        "attempt": 1 + max((run.attempt for run in known_runs), default=0),
    }  # fmt: skip
    return Record(root, asked.model_copy(update=fresh), Resumed(frozenset(finished), frozenset(begun)))


def recall(root: Path, name: str) -> Run | None:
    """Returns what is known of the run ``name``, None when it has never begun."""
    try:
        return _load(root / RUNS / f"{name}.json")
    except (OSError, ValidationError):
        return None


def bury(root: Path, run: Run) -> None:
    """Writes down that ``run`` was killed."""
    Record(root, run.model_copy(update={"state": "killed"}), Resumed())


def tell(root: Path, name: str) -> None:
    """Writes down that it was told how the run ``name`` ended."""
    if (run := recall(root, name)) is not None:
        Record(root, run.model_copy(update={"told": True}), Resumed())


def of_flow_run(root: Path, flow_run: str) -> Run | None:
    """Returns the run that has this id in Prefect."""
    return next((run for run in read(root) if run.flow_run == flow_run), None)


def _load(file: Path) -> Run:
    run = Run.model_validate_json(file.read_bytes())
    # Asked first whether it should be: most have ended.
    return run.model_copy(update={"alive": run.state == "running" and alive.is_held(file.with_suffix(".lock"))})


def _now() -> datetime:
    return datetime.now().astimezone()
