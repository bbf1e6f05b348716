"""Checkpoints of a long stage: kept outside the DVC outputs, keyed by the stage's inputs, verified when loaded.

What all processes share is one file, which one of them writes. The weights of a model that is cut over them lie beside
it, in a folder to which each adds a file; the first file, written last, holds the digests of those.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import xxhash

from tasks import atomic, paths
from tasks.errors import DiskFull, TryAgain
from tasks.heartbeat import ranks
from tasks.parallel import parts
from tasks.world import World

KEPT_RUNS = 3
_SECONDS_TO_TELL = 1.0
_BLOCK = 2**24


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
        # Of those that write parts of one checkpoint.
        self._is_first = True
        # Files that are read from as what was loaded of them is copied, and which files these are on the disk.
        self._mapped: dict[Path, tuple[int, int]] = {}
        self.digest = ""
        """Of the file that was loaded last, of what all processes share."""
        self.none_intact = False
        """Whether the last look for one found some, and none that can be used."""
        self.moved: Callable[[], None] = lambda: None
        """Is called again and again while checkpoints are read."""

    def save(self, step: int, state: dict[str, Any], part: int = 0) -> None:
        """Copies ``state`` as the checkpoint after ``step`` steps; it is written while training goes on.

        Waits only while the one before is being written, and raises what that one raised. All but the last ``kept`` of
        this run are removed. ``part`` 0 holds what all processes share; another, what some process has of its own.
        """
        self.finish()
        self._writing = self._writer.submit(self._write, step, _copy({**state, "key": self.folder.name}), part)

    def save_parts(
        self, step: int, state: dict[str, Any], tensors: dict[str, torch.Tensor], group: dist.ProcessGroup
    ) -> None:
        """Does what :meth:`save` does, of a state of which each process of ``group`` has ``tensors``. Collective."""
        self.finish()
        self._is_first = dist.get_rank(group) == 0
        copied = _copy({**state, "key": self.folder.name}), parts.staged(tensors)
        self._writing = self._writer.submit(self._write_parts, step, *copied, group)

    def _write_parts(
        self, step: int, state: dict[str, Any], tensors: dict[str, torch.Tensor], group: dist.ProcessGroup
    ) -> None:
        try:
            digests = parts.write(tensors, _parts(self.folder, step), group)
        except DiskFull:
            if self._is_first:
                shutil.rmtree(_parts(self.folder, step), ignore_errors=True)
            raise
        if self._is_first:
            self._write(step, {**state, "parts": digests}, 0)

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

    def _write(self, step: int, state: dict[str, Any], part: int) -> None:
        stem, digest = f"{_prefix(part)}{step:09d}", xxhash.xxh3_128()

        def named() -> str:
            return f"{stem}-{digest.hexdigest()}.pt"

        with atomic.file(self.folder / stem, named) as opened:
            try:
                torch.save(state, cast(BinaryIO, _Digested(opened, digest)))
            except RuntimeError as error:
                raise atomic.said_by_the_disk(error) from None
        name = named()
        every = sorted(self.folder.glob(f"{_prefix(part)}*.pt"))
        # Those of this step and later ones are damaged, for training has passed them over.
        passed_over = {file for file in every if _step(file) >= step and file.name != name}
        older = [file for file in every if file not in passed_over]
        for old in {*older[: -self._kept], *passed_over}:
            old.unlink(missing_ok=True)
        self._forget_parts(step)

    def _forget_parts(self, until: int) -> None:
        """Removes the parts, ``until`` a step, of checkpoints that are gone, or never came to be."""
        kept = {_parts(self.folder, _step(file)) for file in self.folder.glob(f"{_prefix(0)}*.pt")}
        for folder in set(self.folder.glob("parts-*")) - kept:
            # Others may have begun with the next step's.
            if _step(folder) <= until:
                shutil.rmtree(folder, ignore_errors=True)

    def keep_one_before(self) -> None:
        """Keeps two checkpoints at least: one of which every process has its part, while the next is written."""
        self._kept = max(2, self._kept)

    def load_latest(self, at_most: int | None = None, part: int = 0) -> dict[str, Any] | None:
        """Returns the newest intact ``part`` of a state, after ``at_most`` steps if that is given, or None.

        A file that is damaged or foreign, or cannot be read, is passed over, which one process of each machine reports.
        In a state whose tensors lie in parts, ``parts`` is their folder.
        """
        own, passed_over = self.folder.name, False
        self.none_intact = False
        found = sorted(
            self._stage.glob(f"{self._pattern()}/{_prefix(part)}*.pt"),
            key=lambda file: (_step(file), file.parent.name == own),
        )
        for file in reversed(found):
            if at_most is not None and _step(file) > at_most:
                continue
            state, bad, fault = self._read(file)
            if state is not None:
                self.none_intact = False
                if not part:
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
            with file.open("rb") as opened:
                if self._digest(opened) != _named_digest(file):
                    return None, file, parts.DAMAGED
                # Mapped, so that the processes of a machine share its pages; by the descriptor, so that it is the very
                # file that was checked. Its bytes are read when they are copied: see `confirm`.
                state: dict[str, Any] = torch.load(f"/proc/self/fd/{opened.fileno()}", mmap=True, weights_only=True)
                self._mapped[file] = _place(opened)
        except OSError as error:
            return None, file, f"cannot be read ({error.strerror})"
        self.moved()
        if state.pop("key") != file.parent.name:
            return None, file, "checkpoint of other inputs"
        if "parts" in state:
            folder = _parts(file.parent, _step(file))
            if found := parts.damaged(folder, state["parts"], self.moved):
                return None, *found
            state["parts"] = folder
        return state, file, ""

    def confirm(self) -> None:
        """Raises :class:`TryAgain` where a file that was loaded is no longer what was checked.

        To be called when what is needed of the states that were loaded has been copied.
        """
        for file, place in self._mapped.items():
            try:
                with file.open("rb") as opened:
                    intact = _place(opened) == place and self._digest(opened) == _named_digest(file)
            except OSError:
                intact = False
            if not intact:
                raise TryAgain(
                    f"{file}: the checkpoint changed while it was read. Run again to go on from what is intact."
                )
        self._mapped.clear()

    def _digest(self, opened: BinaryIO) -> str:
        digest = xxhash.xxh3_128()
        while block := opened.read(_BLOCK):
            digest.update(block)
            self.moved()
        return digest.hexdigest()

    def forget_others(self) -> None:
        """Removes the checkpoints of this stage's older runs, but for the latest few: someone may go back to them.

        Those that may be loaded stay, and so the others can look for them meanwhile.
        """
        if not self._stage.is_dir():
            return
        # What a killed process has begun to write, perhaps of a step that no other ends at.
        atomic.clear(self.folder)
        if listed := [_step(file) for file in self.folder.glob(f"{_prefix(0)}*.pt")]:
            # Not newer ones: another machine may have written a checkpoint that is not listed here yet.
            self._forget_parts(max(listed))
        others = sorted(
            set(self._stage.iterdir()) - {self.folder, *self._stage.glob(self._pattern())},
            key=lambda run: run.stat().st_mtime,
        )
        for run in others[: -(KEPT_RUNS - 1)]:
            shutil.rmtree(run, ignore_errors=True)


class _Digested:
    """A file that is written from its beginning to its end, and the digest of it: the state is in memory once."""

    def __init__(self, file: BinaryIO, digest: xxhash.xxh3_128) -> None:
        self._file, self._digest = file, digest

    def write(self, block: bytes) -> int:
        self._digest.update(block)
        return self._file.write(block)

    def flush(self) -> None:
        self._file.flush()


def agreed(checkpoints: Checkpoints, world: World, part: int) -> dict[str, Any] | None:
    """Returns the newest state that every process has, each with its ``part``. Collective.

    A machine's disk may lack one that another has, or damage it. Raises :class:`tasks.errors.TryAgain` where one has
    none at all: all would begin anew, and write over those of the others.
    """
    limit, latest = None, 0
    while True:
        state = newest(checkpoints, limit, part)
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


def newest(checkpoints: Checkpoints, limit: int | None, part: int) -> dict[str, Any] | None:
    """Returns the newest state of which ``part`` is there too, what that holds in the place of the first part's own."""
    while True:
        state = checkpoints.load_latest(limit)
        if state is None or not part:
            return state
        own = checkpoints.load_latest(state["step"], part)
        if own is None:
            # Whoever wrote the first part was the only one to come so far.
            checkpoints.none_intact = True
            return None
        if own["step"] == state["step"]:
            return {**state, **own}
        limit = own["step"]


def _prefix(part: int) -> str:
    return f"part{part}-" if part else "step-"


def _parts(folder: Path, step: int) -> Path:
    return folder / f"parts-{step:09d}"


def _step(file: Path) -> int:
    return int(file.name.split("-")[1])


def _named_digest(file: Path) -> str:
    return file.stem.rpartition("-")[2]


def _place(opened: BinaryIO) -> tuple[int, int]:
    found = os.fstat(opened.fileno())
    return found.st_dev, found.st_ino


def _copy(value: Any) -> Any:
    """Returns ``value`` with its lists and dictionaries copied, and each tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copy(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    return value
