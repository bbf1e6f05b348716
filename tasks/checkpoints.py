"""Checkpoints of a long stage: kept outside the DVC outputs, keyed by the stage's inputs, verified when loaded.

What grows with the model lies in a folder to which each process adds a file. What all of them share is one file beside
it, which the first one writes last: it holds the digests of those.
"""

import contextlib
import dataclasses
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from tasks import atomic, paths
from tasks.errors import DiskFull, TryAgain
from tasks.heartbeat import ranks
from tasks.parallel import parts
from tasks.parallel.parts import Parts
from tasks.world import World

KEPT_RUNS = 3
_SECONDS_TO_TELL = 1.0


@dataclass(frozen=True)
class Snapshot:
    """What one process brings to a checkpoint: of the ``shared``, which all have alike, that of the first one counts.

    ``own`` is small and stays each process's own. ``tensors`` may be parts of larger ones; what several bring under one
    name is the same.
    """

    shared: dict[str, Any]
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one stage for one set of inputs.

    A file is named for its step and for the digest of its content, so that it appears with its own proof in a single
    rename. DVC deletes a stage's outputs before it reruns the stage; these lie elsewhere and survive that.
    """

    def __init__(self, stage: str, key: str, kept: int, elastic: bool = False, root: Path = paths.CHECKPOINTS) -> None:
        """``kept`` are left of a run. ``elastic``: those that another number of processes has left are loaded too."""
        self._stage = root / stage
        self._kept, self._elastic = kept, elastic
        self.folder = self._stage / key
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        # Of those that write a checkpoint together.
        self._is_first = True
        self.digest = ""
        """Of the file that was loaded last."""
        self.none_intact = False
        """Whether the last look for one found some, and none that can be used."""
        self.moved: Callable[[], None] = lambda: None
        """Is called again and again while checkpoints are read."""

    def save(self, step: int, snapshot: Snapshot, group: dist.ProcessGroup | None = None) -> None:
        """Copies ``snapshot`` as the checkpoint after ``step`` steps; it is written while training goes on.

        Collective over ``group``; None is this process alone. Waits only while the one before is being written, and
        raises what that one raised. All but the last ``kept`` of this run are removed.
        """
        self.finish()
        self._is_first = group is None or dist.get_rank(group) == 0
        shared, own = _copy(snapshot.shared), _copy(snapshot.own)
        copied = Snapshot(shared, own, parts.staged(snapshot.tensors))
        self._writing = self._writer.submit(self._write, step, copied, group)

    def _write(self, step: int, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
        folder = _parts(self.folder, step)
        try:
            written, own = parts.write(snapshot.tensors, folder, group, snapshot.own)
            if self._is_first:
                self._write_shared(step, {**snapshot.shared, "own": own, "parts": dict(written.digests)})
        except DiskFull:
            if self._is_first:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def finish(self) -> None:
        """Returns when the last checkpoint is on the disk. Raises :class:`tasks.errors.DiskFull` when it is full."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except DiskFull as error:
            if self._is_first:
                raise
            # All have met it. The first one tells it, and whoever ends first takes the others along.
            time.sleep(_SECONDS_TO_TELL)
            sys.exit(error.exit_code)

    def _write_shared(self, step: int, state: dict[str, Any]) -> None:
        content = io.BytesIO()
        torch.save({**state, "key": self.folder.name}, content)
        name = f"step-{step:09d}-{xxhash.xxh3_128_hexdigest(content.getbuffer())}.pt"
        atomic.write_bytes(self.folder / name, content.getvalue())
        every = sorted(self.folder.glob("step-*.pt"))
        # Those of this step and later ones are damaged, for training has passed them over.
        passed_over = {file for file in every if _step(file) >= step and file.name != name}
        older = [file for file in every if file not in passed_over]
        for old in {*older[: -self._kept], *passed_over}:
            old.unlink(missing_ok=True)
        self._forget_parts(step)

    def _forget_parts(self, until: int) -> None:
        """Removes the parts, ``until`` a step, of checkpoints that are gone, or never came to be."""
        kept = {_parts(self.folder, _step(file)) for file in self.folder.glob("step-*.pt")}
        for folder in set(self.folder.glob("parts-*")) - kept:
            # Others may have begun with the next step's.
            if _step(folder) <= until:
                shutil.rmtree(folder, ignore_errors=True)

    def load_latest(self, at_most: int | None = None) -> dict[str, Any] | None:
        """Returns the newest intact state, after ``at_most`` steps if that is given, or None.

        What is damaged or foreign, or cannot be read, is passed over, which one process of each machine reports. The
        tensors are not read: ``parts`` of the state says where they lie.
        """
        own, passed_over = self.folder.name, False
        self.none_intact = False
        found = sorted(
            self._stage.glob(f"{self._pattern()}/step-*.pt"),
            key=lambda file: (_step(file), file.parent.name == own),
        )
        for file in reversed(found):
            if at_most is not None and _step(file) > at_most:
                continue
            state, bad, fault = self._read(file)
            if state is not None:
                self.none_intact = False
                self.digest = _named_digest(file)
                return state
            self.none_intact = True
            # Of parts, each process has looked at others.
            if bad.name.startswith("__") or os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"warning: {bad}: {fault}; going back to the one before", file=sys.stderr, flush=True)
                passed_over = True
        if passed_over:
            print(f"warning: {self.folder}: there is none before; it begins anew", file=sys.stderr, flush=True)
        return None

    def _pattern(self) -> str:
        """Returns which folders hold checkpoints that are loaded."""
        inputs, apart, _ = self.folder.name.partition("-")
        return f"{inputs}-*" if self._elastic and apart else self.folder.name

    def _read(self, file: Path) -> tuple[dict[str, Any] | None, Path, str]:
        """Returns the state in ``file``; None where it cannot be used, and which file is at fault, and why."""
        try:
            content = file.read_bytes()
        except OSError as error:
            return None, file, f"cannot be read ({error.strerror})"
        self.moved()
        if xxhash.xxh3_128_hexdigest(content) != _named_digest(file):
            return None, file, parts.DAMAGED
        state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        if state.pop("key") != file.parent.name:
            return None, file, "checkpoint of other inputs"
        state["parts"] = Parts(_parts(file.parent, _step(file)), state["parts"])
        if found := parts.damaged(parts.of_this_process(state["parts"]), self.moved):
            return None, *found
        return state, file, ""

    @contextlib.contextmanager
    def confirmed(self, state: dict[str, Any] | None) -> Iterator[None]:
        """Raises :class:`TryAgain` at its end where the tensors of ``state`` are no longer what was checked.

        They are to be read within, by all processes before one of them leaves it.
        """
        if state is None:
            yield
            return
        try:
            yield
        except Exception:
            # What another process would look at may be what this one could not read.
            self._confirm(state["parts"])
            raise
        self._confirm(parts.of_this_process(state["parts"]))

    def _confirm(self, checked: Parts) -> None:
        if found := parts.damaged(checked, self.moved):
            raise TryAgain(
                f"{found[0]}: the checkpoint changed while it was read. Run again to go on from what is intact."
            ) from None

    def forget_others(self) -> None:
        """Removes the checkpoints of this stage's older runs, but for the latest few: someone may go back to them.

        Those that may be loaded stay, and so the others can look for them meanwhile.
        """
        if not self._stage.is_dir():
            return
        # What a killed process has begun to write, perhaps of a step that no other ends at.
        atomic.clear(self.folder)
        if listed := [_step(file) for file in self.folder.glob("step-*.pt")]:
            # Not newer ones: another machine may have written a checkpoint that is not listed here yet.
            self._forget_parts(max(listed))
        others = sorted(
            set(self._stage.iterdir()) - {self.folder, *self._stage.glob(self._pattern())},
            key=lambda run: run.stat().st_mtime,
        )
        for run in others[: -(KEPT_RUNS - 1)]:
            shutil.rmtree(run, ignore_errors=True)


def agreed(checkpoints: Checkpoints, world: World) -> dict[str, Any] | None:
    """Returns the newest state that every process has. Collective.

    A machine's disk may lack one that another has, or damage it. Raises :class:`tasks.errors.TryAgain` where one has
    none at all: all would begin anew, and write over those of the others.
    """
    limit, latest = None, 0
    while True:
        state = checkpoints.load_latest(limit)
        step = state["step"] if state is not None else 0
        if limit is None:
            of_all = world.of_all(-1 if checkpoints.none_intact else step)
            latest = max(of_all)
            if latest > 0 and 0 in of_all:
                world.fail(_missing(checkpoints, latest, [rank for rank, one in enumerate(of_all) if not one]))
        limit = world.lowest(step)
        if world.lowest(-step) != -limit:
            continue
        # Of one step there may be two, from different numbers of processes.
        which = int(checkpoints.digest[:15], 16) if state is not None else 0
        if world.lowest(-which) == -world.lowest(which):
            if step < latest and world.is_first:
                then = f"go on from step {step:,}" if step else "begin anew"
                told = f"not all processes have the checkpoint of step {latest:,}; all {then}"
                print(f"warning: {checkpoints.folder}: {told}", file=sys.stderr, flush=True)
            return state
        limit -= 1


def _missing(checkpoints: Checkpoints, step: int, without: list[int]) -> TryAgain:
    return TryAgain(
        f"{checkpoints.folder}: {ranks(without)} found no checkpoint there, and another process that of step {step:,}. "
        "The machines have to share that folder; where they do, run again. To begin anew, remove it everywhere."
    )


def _parts(folder: Path, step: int) -> Path:
    return folder / f"parts-{step:09d}"


def _step(file: Path) -> int:
    return int(file.name.split("-")[1])


def _named_digest(file: Path) -> str:
    return file.stem.rpartition("-")[2]


def _copy(value: Any) -> Any:
    """Returns ``value`` with its lists and dictionaries copied, and each tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copy(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    return value
