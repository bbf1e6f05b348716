"""One DVC command of a run, from start to classified end. Knows no Prefect."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from flows import dvc, dvc_fork, dvc_lock, failures, process
from tasks import paths
from tasks.progress import Event

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
    classify: Callable[[int, str], dvc.Result] = dvc.classify,
) -> dvc.Result:
    """Runs ``command`` for ``stage``, appending to the stage's log, and returns how it ended, as ``classify`` says.

    Waits for other DVC commands at work in the project, since what has finished is worth it. A failure is remembered
    under ``.overnight/failed`` until the stage starts again.
    """
    failures.forget(site.root, stage)
    result = _attempt(site, stage, command, on_event, classify)
    if result.locked:
        # It came between the look and the start.
        result = _attempt(site, stage, command, on_event, classify)
    if result.outcome == "failed":
        remember(site, stage, result)
    return result


def _attempt(
    site: Site,
    stage: str,
    command: Sequence[str],
    on_event: Callable[[Event], None],
    classify: Callable[[int, str], dvc.Result],
) -> dvc.Result:
    log = site.root / site.log(stage)
    begin = log.stat().st_size if log.exists() else 0
    dvc_lock.mend(site.root)
    dvc_lock.await_others(site.root, lambda line: on_event(Event(stage, "", 0, 0, "", 0, notice=line)))
    environment, kind = dvc.environment(os.environ), dvc_fork.kind(command)
    code = process.run(command, log, environment, on_event, kept=[site.lock], kind=kind)
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
