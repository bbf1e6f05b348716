"""Checkpoints of a long stage: kept outside the DVC outputs, keyed by the stage's inputs, verified when loaded."""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import xxhash

from tasks import atomic, paths

KEPT_PER_RUN = 2
KEPT_RUNS = 3


class Checkpoints:
    """The checkpoints of one stage for one set of inputs.

    A file is named for its step and for the digest of its content, so that it appears with its own proof in a single
    rename. DVC deletes a stage's outputs before it reruns the stage; these lie elsewhere and survive that.
    """

    def __init__(self, stage: str, key: str, root: Path = paths.CHECKPOINTS) -> None:
        self._stage = root / stage
        self.folder = self._stage / key

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes ``state`` as the checkpoint after ``step`` steps and removes all but the last two of this run."""
        buffer = io.BytesIO()
        torch.save({**state, "key": self.folder.name}, buffer)
        content = buffer.getvalue()
        atomic.write_bytes(self.folder / f"step-{step:09d}-{xxhash.xxh3_128_hexdigest(content)}.pt", content)
        for old in self._files()[:-KEPT_PER_RUN]:
            old.unlink(missing_ok=True)

    def load_latest(self) -> dict[str, Any] | None:
        """Returns the newest intact state, or None. A damaged or foreign file is reported and passed over."""
        for file in reversed(self._files()):
            content = file.read_bytes()
            if xxhash.xxh3_128_hexdigest(content) == file.stem.rpartition("-")[2]:
                state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
                if state.pop("key") == self.folder.name:
                    return state
                fault = "checkpoint of other inputs"
            else:
                fault = "damaged checkpoint"
            print(f"warning: {file}: {fault}; going back to the one before", file=sys.stderr, flush=True)
        return None

    def forget_others(self) -> None:
        """Removes the checkpoints of this stage's older runs, but for the latest few: someone may go back to them."""
        if not self._stage.is_dir():
            return
        others = sorted(
            (run for run in self._stage.iterdir() if run != self.folder), key=lambda run: run.stat().st_mtime
        )
        for run in others[: -(KEPT_RUNS - 1)]:
            shutil.rmtree(run, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))
