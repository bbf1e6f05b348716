"""``overnight runs``: lists the runs, from their records."""

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.runs import Run

_STYLES: Mapping[str, str] = {
    "running": "cyan",
    "completed": "green",
    "unchanged": "dim",
    "refused": "yellow",
    "skipped": "yellow",
    "failed": "bold red",
    "stopped": "bold red",
    "killed": "bold red",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the list, in words."""

    run: str
    started: str
    state: str
    stage: str
    duration: str
    version: str
    why: str


def row(run: Run) -> Row:
    """Returns what the list says about ``run``."""
    last = run.last_stage
    stage = last.stage if last is not None and (run.can_go_on or run.state == "running") else ""
    told = run.reason or (last.message if last is not None and run.can_go_on else "")
    if run.condition == "killed":
        # Not from the record: nobody was left to write it.
        told = f"its process {run.pid} died without a word; `overnight rerun {run.run}` goes on with it"
    return Row(
        run=run.run,
        started=f"{run.started.astimezone():%Y-%m-%d %H:%M}",
        state=run.condition,
        stage=stage,
        duration=_duration(run.seconds),
        version=run.version or "",
        why=told,
    )


def show(console: Console, runs: Sequence[Run]) -> None:
    """Prints a table on a terminal, elsewhere one line a run with tabs between the fields."""
    rows = [row(run) for run in runs]
    if not console.is_terminal:
        for one in rows:
            print("\t".join(dataclasses.astuple(one)), file=console.file)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "started", "state", "stage", "duration", "version", "why"):
        table.add_column(title, overflow="fold" if title == "why" else "ellipsis", no_wrap=title != "why")
    for one in rows:
        state = Text(one.state, style=_STYLES[one.state])
        table.add_row(one.run, one.started, state, one.stage, one.duration, one.version, Text(one.why))
    console.print(table)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return str(timedelta(seconds=round(seconds))) if seconds >= 60 else f"{seconds:.0f} s"
