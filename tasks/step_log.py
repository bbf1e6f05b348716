"""Every step of a training: a JSON line in ``.overnight/measurements``, and TensorBoard where it is installed."""

import importlib.util
import json
import shutil
from typing import Any

from tasks import atomic, paths
from tasks.step_meter import StepReport


class StepLog:
    """The log of one stage's steps; it is no part of a version. A resumed run goes on with what was there."""

    def __init__(self, stage: str, done: int) -> None:
        self.path = paths.MEASUREMENTS / f"{stage}-steps.jsonl"
        # Steps after the checkpoint are taken again.
        atomic.write_text(self.path, "".join(_first(self.path.read_text(), done) if self.path.exists() else []))
        self._file = self.path.open("a", buffering=1)
        self._board = _board(stage, done)

    def write(self, report: StepReport) -> None:
        with atomic.disk_full_is_told(self.path):
            self._file.write(json.dumps(report.to_json()) + "\n")
        if self._board is not None:
            for name, value in report.to_json().items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, report.step)
            for layer, load in enumerate(report.expert_load):
                self._board.add_scalar(f"expert_load/{layer}", load, report.step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


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
