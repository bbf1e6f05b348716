"""One DVC command of a run, from start to classified end. Knows no Prefect."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from flows import dvc, failures, process
from tasks import paths
from tasks.progress import Event

LOGS = paths.SCRATCH / "logs"


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a run works: the project's ``root``, the run's name, and the descriptor of the lock it holds."""

    root: Path
    run: str
    lock: int

    def log(self, stage: str) -> Path:
        """Returns the log of ``stage``, relative to the project."""
        return LOGS / self.run / f"{failures.file_name(stage)}.log"


def execute(site: Site, stage: str, command: Sequence[str], on_event: Callable[[Event], None]) -> dvc.Result:
    """Runs ``command`` for ``stage``, appending to the stage's log, and returns how it ended.

    A failure is remembered under ``.overnight/failed`` until the stage succeeds.
    """
    log = site.root / site.log(stage)
    begin = log.stat().st_size if log.exists() else 0
    dvc.drop_damaged_lock(site.root)
    code = process.run(command, log, dvc.environment(os.environ), on_event, kept=[site.lock])
    with log.open("rb") as file:
        file.seek(begin)
        result = dvc.classify(code, file.read().decode(errors="replace"))
    if result.outcome == "failed":
        remember(site, stage, result)
    else:
        failures.forget(site.root, stage)
    return result


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
