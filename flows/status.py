"""``overnight status``: for each stage whether it is up to date, and if not, why. Needs no Prefect."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows import dvc, failures
from flows.failures import Failure
from flows.graph import COLLECT, Graph
from tasks import paths

_MOST_REASONS = 4


class Condition(enum.StrEnum):
    """In which condition a stage is."""

    UP_TO_DATE = "up to date"
    STALE = "stale"
    NEVER_RUN = "never run"
    FAILED = "failed"


_STYLES = {
    Condition.UP_TO_DATE: "green",
    Condition.STALE: "yellow",
    Condition.NEVER_RUN: "dim",
    Condition.FAILED: "bold red",
}


@dataclasses.dataclass(frozen=True)
class StageStatus:
    """The condition of one stage, and the reasons: what changed, or the last line of an error."""

    stage: str
    condition: Condition
    reasons: tuple[str, ...] = ()


def read(root: Path) -> tuple[StageStatus, ...]:
    """Returns the status of ``collect`` and of every stage of ``dvc.yaml``, in order."""
    pointer = paths.RAW.with_name(f"{paths.RAW.name}.dvc")
    return assess(dvc.graph(root), dvc.changes(root), failures.recall(root), collected=(root / pointer).exists())


def assess(
    graph: Graph, changes: dvc.Changes, failed: Mapping[str, Failure], collected: bool
) -> tuple[StageStatus, ...]:
    """Returns the status of every stage. A pure function.

    A failure counts only while its stage is not up to date. A stage that is unchanged itself is stale when something
    upstream of it is. ``collected`` says whether ``data/raw`` has ever been versioned.
    """
    raw = [change for stale in changes.data.values() for change in stale.changes if Path(change.name) == paths.RAW]
    found = {COLLECT: _of_collect(raw, failed, collected)}
    for stage in graph.stages:
        stale = changes.stages.get(stage.name)
        waits = [name for name in stage.upstream if found[name].condition != Condition.UP_TO_DATE]
        if stale is None and not waits:
            found[stage.name] = StageStatus(stage.name, Condition.UP_TO_DATE)
        elif stage.name in failed:
            found[stage.name] = StageStatus(stage.name, Condition.FAILED, (failed[stage.name].message,))
        elif stale is not None and stale.never_run:
            found[stage.name] = StageStatus(stage.name, Condition.NEVER_RUN)
        else:
            changed = tuple(map(str, stale.changes)) if stale is not None else ()
            # A dependency that is missing or old because of a stage upstream is told there.
            upstream = tuple(f"{name} is {found[name].condition}" for name in waits)
            found[stage.name] = StageStatus(stage.name, Condition.STALE, (*changed, *upstream))
    return tuple(found.values())


def _of_collect(raw: Sequence[dvc.Change], failed: Mapping[str, Failure], collected: bool) -> StageStatus:
    if COLLECT in failed:
        return StageStatus(COLLECT, Condition.FAILED, (failed[COLLECT].message,))
    if not collected:
        return StageStatus(COLLECT, Condition.NEVER_RUN)
    if raw:
        return StageStatus(COLLECT, Condition.STALE, tuple(map(str, raw)))
    return StageStatus(COLLECT, Condition.UP_TO_DATE)


def show(console: Console, statuses: Sequence[StageStatus]) -> None:
    """Prints a table on a terminal, elsewhere one plain line a stage: ``train: stale: params.yaml: ... modified``."""
    if not console.is_terminal:
        for status in statuses:
            line = ": ".join(filter(None, [status.stage, status.condition, "; ".join(status.reasons)]))
            console.print(line, markup=False, highlight=False, soft_wrap=True)
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
