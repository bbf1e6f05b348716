"""``overnight status``: for each stage whether it is up to date, and if not, why. Needs no Prefect.

While a run is at work it is asked what it does (:mod:`flows.running`), and DVC is not: it holds what the run works on.
"""

import dataclasses
import enum
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows import dvc, dvc_lock, failures, lock, raw, running, runs, stopped
from flows.failures import Failure
from flows.graph import CHAMPION, COLLECT, INIT, Graph
from flows.running import Running
from flows.terminal import print_line
from tasks import paths
from tasks.errors import EXIT_USER_MISTAKE
from tasks.params import Params

_MOST_REASONS = 4


class Condition(enum.StrEnum):
    """In which condition a stage is."""

    UP_TO_DATE = "up to date"
    STALE = "stale"
    NEVER_RUN = "never run"
    FAILED = "failed"
    STOPPED = "stopped"
    RUNNING = "running"
    WAITING = "waiting"
    SKIPPED = "skipped"


_STYLES = {
    Condition.UP_TO_DATE: "green",
    Condition.STALE: "yellow",
    Condition.NEVER_RUN: "dim",
    Condition.FAILED: "bold red",
    Condition.STOPPED: "bold yellow",
    Condition.RUNNING: "bold",
    Condition.WAITING: "dim",
    Condition.SKIPPED: "yellow",
}
_OF_A_RUN = {
    "waiting": Condition.WAITING,
    "running": Condition.RUNNING,
    "ran": Condition.UP_TO_DATE,
    "cached": Condition.UP_TO_DATE,
    "skipped": Condition.SKIPPED,
    "failed": Condition.FAILED,
}
# A run reads its graph first, which takes a second, and holds no file of the project meanwhile.
_SECONDS_TO_START = 10.0
_SECONDS_BETWEEN_LOOKS = 0.1


@dataclasses.dataclass(frozen=True)
class StageStatus:
    """The condition of one stage, and the reasons: what changed, or the last line of an error."""

    stage: str
    condition: Condition
    reasons: tuple[str, ...] = ()


def read(root: Path, params: Params) -> tuple[StageStatus, ...]:
    """Returns the status of ``collect`` and of every stage of ``dvc.yaml``, in order.

    Raises :class:`flows.dvc_lock.Busy` when a DVC command that is no run's is at work.
    """
    while True:
        if (run := _at_work(root)) is not None:
            return of_run(run)
        try:
            return _between_runs(root, params)
        except dvc_lock.Busy:
            # Of a run that has started meanwhile?
            if lock.holder(root) is None:
                dvc_lock.check_others(root, "Ask again when it has ended.")


def _at_work(root: Path) -> Running | None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while (holder := lock.holder(root)) is not None and time.monotonic() < deadline:
        run = running.read(root)
        if run is not None and run.run == holder.run and run.stages:
            return run
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return None


def _between_runs(root: Path, params: Params) -> tuple[StageStatus, ...]:
    last = runs.last_at_work(root)
    # What a night left lies in its worktree.
    place = stopped.place(root, last)
    edited = datetime.fromtimestamp((place / paths.PARAMS).stat().st_mtime, UTC)
    return assess(
        dvc.graph(root),
        dvc.changes(root),
        {name: _dated(failure, edited) for name, failure in failures.recall(place).items()},
        stopped.recall(root, params, last),
        (root / raw.POINTER).exists(),
        _uncollected(root, params),
    )


def _uncollected(root: Path, params: Params) -> list[str]:
    """Returns the sources of which no run has collected anything yet."""
    text = root / paths.RAW
    return [source.name for source in params.collect.sources if text.is_dir() and not (text / source.name).exists()]


def _dated(failure: Failure, edited: datetime) -> Failure:
    # The cure of a mistake may be there already.
    if failure.exit_code != EXIT_USER_MISTAKE or failure.at >= edited:
        return failure
    return failure.model_copy(update={"message": f"{failure.message} ({paths.PARAMS} has been edited since)"})


def of_run(run: Running) -> tuple[StageStatus, ...]:
    """Returns the status of every stage while ``run`` is at work. A pure function."""
    found = []
    for stage in run.stages:
        reasons = [stage.message] if stage.message else []
        if stage.state == "running" and stage.since is not None:
            told = filter(None, [f"since {stage.since.astimezone():%H:%M:%S}", stage.progress])
            reasons.append(f"{', '.join(told)} (run {run.run}, process {run.pid})")
        found.append(StageStatus(stage.stage, _OF_A_RUN[stage.state], tuple(reasons)))
    return tuple(found)


def assess(
    graph: Graph,
    changes: dvc.Changes,
    failed: Mapping[str, Failure],
    halted: Mapping[str, str],
    collected: bool,
    uncollected: Sequence[str] = (),
) -> tuple[StageStatus, ...]:
    """Returns the status of every stage. A pure function.

    A failure, and where a stage stopped (``halted``), count only while the stage is not up to date; that of what a
    stage is brought has a row of its own while that stage is not. A stage that is unchanged itself is stale when
    something upstream of it is. ``collected`` says whether ``data/raw`` has ever been versioned, ``uncollected`` of
    which sources it has nothing.
    """
    text = [change for stale in changes.data.values() for change in stale.changes if Path(change.name) == paths.RAW]
    new = [f"nothing of source '{name}' is there" for name in uncollected]
    found = {COLLECT: _of_collect([*map(str, text), *new], failed, collected)}
    for stage in graph.stages:
        stale = changes.stages.get(stage.name)
        waits = [name for name in stage.upstream if found[name].condition != Condition.UP_TO_DATE]
        if stale is None and not waits:
            found[stage.name] = StageStatus(stage.name, Condition.UP_TO_DATE)
        elif stage.name in failed:
            where = [f"stopped {halted[stage.name]}"] if stage.name in halted else []
            found[stage.name] = StageStatus(stage.name, Condition.FAILED, (failed[stage.name].message, *where))
        elif stage.name in halted and not waits:
            # That its outputs are gone goes without saying.
            known = stale.changes if stale is not None and not stale.never_run else ()
            why = tuple(str(change) for change in known if change.kind != "output")
            found[stage.name] = StageStatus(stage.name, Condition.STOPPED, (halted[stage.name], *why))
        elif stale is not None and stale.never_run:
            found[stage.name] = StageStatus(stage.name, Condition.NEVER_RUN)
        else:
            changed = tuple(map(str, stale.changes)) if stale is not None else ()
            # A dependency that is missing or old because of a stage upstream is told there.
            upstream = tuple(f"{name} is {found[name].condition}" for name in waits)
            found[stage.name] = StageStatus(stage.name, Condition.STALE, (*changed, *upstream))
    behind = [stage for stage in graph.stages if found[stage.name].condition != Condition.UP_TO_DATE]
    brought = {INIT: any(stage.reads_init for stage in behind), CHAMPION: any(stage.reads_champion for stage in behind)}
    refused = [
        StageStatus(name, Condition.FAILED, (failed[name].message,))
        for name, is_read in brought.items()
        if is_read and name in failed
    ]
    collect, *rest = found.values()
    return (collect, *refused, *rest)


def _of_collect(reasons: Sequence[str], failed: Mapping[str, Failure], collected: bool) -> StageStatus:
    if COLLECT in failed:
        return StageStatus(COLLECT, Condition.FAILED, (failed[COLLECT].message,))
    if not collected:
        return StageStatus(COLLECT, Condition.NEVER_RUN)
    if reasons:
        return StageStatus(COLLECT, Condition.STALE, tuple(reasons))
    return StageStatus(COLLECT, Condition.UP_TO_DATE)


def show(console: Console, statuses: Sequence[StageStatus]) -> None:
    """Prints a table on a terminal, elsewhere one plain line a stage: ``train: stale: params.yaml: ... modified``."""
    if not console.is_terminal:
        for status in statuses:
            line = ": ".join(filter(None, [status.stage, status.condition, "; ".join(status.reasons)]))
            print_line(console, line)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage", "status", "why"):
        table.add_column(title)
    for status in statuses:
        reasons = [*status.reasons[:_MOST_REASONS]]
        if len(status.reasons) > _MOST_REASONS:
            reasons.append(f"and {len(status.reasons) - _MOST_REASONS} more (`dvc status {status.stage}`)")
        style = _STYLES[status.condition]
        table.add_row(status.stage, Text(status.condition, style=style), Text("\n".join(reasons)))
    console.print(table)
