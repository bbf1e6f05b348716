"""Every step of a training: a JSON line in ``.overnight/measurements``, and TensorBoard where it is installed.

What the steps took is summed up in ``speed/STAGE.csv``, which Git keeps with a version and ``dvc plots`` draws.
"""

import csv
import importlib.util
import io
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tasks import atomic, paths
from tasks.step_meter import StepReport

SPEEDS = ("step", "tokens_per_second", "mfu", "waiting_for_data", "communicating", "memory_mib")


class StepLog:
    """The log of one stage's steps; it is no part of a version. A resumed run goes on with what was there."""

    def __init__(self, stage: str, done: int) -> None:
        self.path = _path(stage)
        # Steps after the checkpoint are taken again.
        before = self.path.read_text(errors="replace") if self.path.exists() else ""
        atomic.write_text(self.path, "".join(_first(before, done)))
        self._file = self.path.open("a", buffering=1)
        self._board = _board(stage, done)

    def write(self, report: StepReport) -> None:
        with atomic.disk_full_is_told(self.path):
            self._file.write(json.dumps(report.to_json()) + "\n")
        if self._board is not None:
            for name, value in report.to_json().items():
                if isinstance(value, float | int) and name != "step":
                    self._board.add_scalar(name, value, report.step)
            for layer, load in enumerate(report.expert_load):
                self._board.add_scalar(f"expert_load/{layer}", load, report.step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def logged(stage: str) -> Iterator[dict[str, Any]]:
    """Yields what :class:`StepLog` holds of each step of ``stage``."""
    with _path(stage).open() as file:
        yield from map(json.loads, file)


def sum_up(stage: str, steps: Iterable[dict[str, Any]], every: int) -> None:
    """Writes what ``steps`` of ``stage`` took: a row of ``SPEEDS`` for each stretch of ``every`` steps.

    ``waiting_for_data`` and ``communicating`` are shares of the time, the latter empty where not all of it was seen;
    ``memory_mib`` is the most of the stretch.
    """
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(SPEEDS)
    for _, stretch in itertools.groupby(steps, lambda step: (step["step"] - 1) // every):
        writer.writerow(_summed_up(list(stretch)))
    atomic.write_text(paths.SPEED / f"{stage}.csv", rows.getvalue())


def _summed_up(steps: list[dict[str, Any]]) -> Iterator[str]:
    seconds = sum(step["seconds"] for step in steps)
    yield str(steps[-1]["step"])
    for name in ("tokens_per_second", "mfu"):
        yield f"{sum(step[name] * step['seconds'] for step in steps) / seconds:.4g}"
    for name in ("seconds_for_data", "seconds_for_communication"):
        values = [step[name] for step in steps]
        yield "" if None in values else f"{sum(values) / seconds:.4g}"
    yield f"{max(step['memory_mib'] for step in steps):.0f}"


def _path(stage: str) -> Path:
    return paths.MEASUREMENTS / f"{stage}-steps.jsonl"


def _first(text: str, done: int) -> list[str]:
    """Returns the whole lines of the steps up to ``done``; a killed run may have left half a line."""
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _board(stage: str, done: int) -> Any:
    """Returns TensorBoard's writer, or None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    folder = paths.SCRATCH / "tensorboard" / stage
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder), purge_step=done + 1)
