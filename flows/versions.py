"""``overnight versions``: each version with its data, its quality and its size, from Git's objects and DVC's cache."""

import contextlib
import dataclasses
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows import contents, dvc, objects, project, registry
from flows.gate import PASSED, REFUSED
from flows.registry import Version
from flows.summary import Evaluation
from flows.terminal import print_line
from tasks import paths
from tasks.errors import TryAgain, UserMistake

_SHORT = 7
_UNKNOWN = "-"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True)
class Row:
    """What there is to know of a version at a glance.

    ``data`` is the short hash of ``data/raw``; ``bits_per_byte`` that of the INT8 model on held-out text; ``size`` in
    bytes, of all that DVC holds for it. What cannot be had is None.
    """

    name: str
    at: datetime
    commit: str
    stages: tuple[str, ...]
    data: str | None = None
    bits_per_byte: float | None = None
    passed: bool | None = None
    size: int | None = None
    # Why its measurements cannot be had, where neither the cache nor the remote gives them.
    unread: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as it is shown, in the order of :data:`TITLES`."""
        return (
            self.name,
            f"{self.at.astimezone():%Y-%m-%d %H:%M}",
            self.data or _UNKNOWN,
            self.commit[:_SHORT],
            _UNKNOWN if self.bits_per_byte is None else f"{self.bits_per_byte:.3f}",
            {True: "passed", False: "refused", None: _UNKNOWN}[self.passed],
            ", ".join(self.stages) or _UNKNOWN,
            _UNKNOWN if self.size is None else describe_size(self.size),
        )


TITLES = ("version", "date", "data", "commit", "INT8 bits per byte", "gate", "stage", "size")


def versions(last: int | None, out: Console, err: Console) -> int:
    """Shows the ``last`` versions, all with None, the newest first, and returns the exit code, 0."""
    root = project.find()
    params = project.parameters(root)
    try:
        registry.fetch(root, params.publish.git_remote)
    except UserMistake as error:
        err.print(f"showing what is known here: {error}", markup=False, soft_wrap=True)
    known = registry.versions(root)
    if not known:
        err.print("no version yet; `overnight publish` makes the first of what the last run made.", soft_wrap=True)
        return 0
    shown = known[-last:] if last is not None else known
    rows = read(root, shown[::-1], params.publish.data_remote)
    show(out, rows)
    if lacking := [row.unread for row in rows if row.unread]:
        print_line(err, f"the measurements of {len(lacking)} of them cannot be had: {lacking[0]}")
    if len(shown) < len(known):
        err.print(f"and {len(known) - len(shown)} older ones (`overnight versions --all`).", soft_wrap=True)
    return 0


def read(root: Path, wanted: Sequence[Version], remote: str | None = None) -> tuple[Row, ...]:
    """Returns a row for each of ``wanted``. Measurements that the cache has lost come from the DVC remote."""
    with dvc.store(root, remote) as store:
        return tuple(_row(root, store, version) for version in wanted)


def describe_size(size: float) -> str:
    """Returns a number of bytes with a unit: ``12.3 MiB``."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:,.1f} {_UNITS[unit]}" if unit else f"{size:,.0f} B"


def show(console: Console, rows: Sequence[Row]) -> None:
    """Prints a table on a terminal, elsewhere one line a version, its cells two spaces or more apart."""
    if console.is_terminal:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in TITLES:
            table.add_column(title, justify="right" if title in ("INT8 bits per byte", "size") else "left")
        for row in rows:
            style = "bold green" if registry.PRODUCTION in row.stages else "red" if row.passed is False else ""
            table.add_row(*(Text(cell, style=style) for cell in row.cells))
        console.print(table)
        return
    cells = [TITLES, *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print_line(console, text.rstrip())


def _row(root: Path, store: dvc.Store, version: Version) -> Row:
    verdict = version.message.split("\n")[0]
    told = True if verdict.startswith(PASSED) else False if verdict.startswith(REFUSED) else None
    row = Row(version.name, version.at, version.commit, version.stages, passed=told)
    try:
        outputs = {output.path: output for output in contents.recorded(root, version.commit)}
    except UserMistake:
        # Somebody tagged a commit that holds no pipeline.
        return row
    evaluation = Evaluation()
    unread = ""
    try:
        with contextlib.suppress(KeyError, ValidationError):
            evaluation = Evaluation.model_validate_json(objects.read(store, outputs[paths.EVALUATION]))
    except (UserMistake, TryAgain) as error:
        unread = str(error)
    int8 = evaluation.models.int8
    return dataclasses.replace(
        row,
        data=outputs[paths.RAW].md5[:_SHORT] if paths.RAW in outputs else None,
        bits_per_byte=int8.bits_per_byte.value if int8 and int8.bits_per_byte else None,
        passed=evaluation.gate.passed if evaluation.gate else told,
        size=sum(output.size for output in outputs.values()),
        unread=unread,
    )
