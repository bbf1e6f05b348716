"""One command of a run, DVC's mostly, from start to classified end. Knows no Prefect."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from flows import dvc, dvc_fork, dvc_lock, failures, process, stall
from tasks import paths
from tasks.progress import Event

Classify = Callable[[int, str], dvc.Result]
LOGS = paths.SCRATCH / "logs"
# A month of nights.
_KEPT_RUNS = 30


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a run works: the project's ``root``, the run's name, and the descriptor of the lock it holds.

    ``home`` is where its logs go when ``root`` is a worktree, which does not last.
    """

    root: Path
    run: str
    lock: int
    home: Path | None = None

    def log(self, stage: str) -> Path:
        """Returns the log of ``stage``, relative to the project, or absolute for a run that works in a worktree."""
        return (self.home or Path()) / LOGS / self.run / f"{failures.file_name(stage)}.log"


def drop_old_logs(root: Path) -> None:
    """Removes the logs of all runs but those that were at work last."""
    kept = sorted((root / LOGS).glob("*"), key=lambda run: run.stat().st_mtime, reverse=True)
    for run in kept[_KEPT_RUNS:]:
        shutil.rmtree(run, ignore_errors=True)


def execute(
    site: Site,
    stage: str,
    command: Sequence[str],
    on_event: Callable[[Event], None],
    classify: Classify = dvc.classify,
    minutes: float | None = None,
) -> dvc.Result:
    """Runs ``command`` for ``stage`` as :func:`run` does, with the stage's log.

    A failure is remembered under ``.overnight/failed`` until the stage starts again.
    """
    failures.forget(site.root, stage)
    result = run(site.root, command, site.root / site.log(stage), on_event, [site.lock], classify, minutes, stage)
    if result.outcome == "failed":
        remember(site, stage, result)
    return result


def run(
    root: Path,
    command: Sequence[str],
    log: Path,
    on_event: Callable[[Event], None],
    kept: Iterable[int] = (),
    classify: Classify = dvc.classify,
    minutes: float | None = None,
    stage: str = "",
) -> dvc.Result:
    """Runs ``command``, appending to ``log``, and returns how it ended, as ``classify`` says.

    Waits for other DVC commands at work in the project, since what has finished is worth it. One that asks a remote is
    ended when nothing has moved for ``minutes``. ``kept`` are descriptors that stay open while anything of it lives.
    """
    for _ in range(2):
        dvc_lock.mend(root)
        dvc_lock.await_others(root, lambda line: on_event(Event(stage, "", 0, 0, "", 0, notice=line)))
        result = logged(command, log, dvc.environment(os.environ), on_event, kept, classify, minutes)
        if not result.locked:
            break
        # It came between the look and the start.
    return result


def logged(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    on_event: Callable[[Event], None],
    kept: Iterable[int] = (),
    classify: Classify = dvc.classify,
    minutes: float | None = None,
) -> dvc.Result:
    """Runs ``command`` once as :func:`run` does, whatever else is at work; ``classify`` gets what it has said."""
    begin = log.stat().st_size if log.exists() else 0
    limit = None if minutes is None else 60 * minutes
    try:
        code = process.run(command, log, environment, on_event, kept, dvc_fork.kind(command), limit)
    except stall.Stalled as error:
        return dvc.Result("failed", None, str(error), mendable=True)
    with log.open("rb") as file:
        file.seek(begin)
        return classify(code, file.read().decode(errors="replace"))


def remember(site: Site, stage: str, result: dvc.Result) -> None:
    """Keeps the failure of ``stage`` for `overnight status`."""
    failures.remember(
        site.root,
        failures.Failure(
            stage=stage,
            run=site.run,
            at=datetime.now().astimezone(),
            exit_code=result.exit_code,
            message=result.message,
            log=site.log(stage),
        ),
    )
