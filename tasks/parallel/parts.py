"""The tensors of a checkpoint, in parts: each process writes what falls to it, and reads what it needs of all.

torch.distributed.checkpoint knows of each tensor which elements a process has, so that a state is read on another mesh
than it was written on, and no process ever holds the whole of a model that is cut. Names are those of the whole model:
``model.NAME`` for weights, ``optimizer.NAME.KEY`` for what an optimizer keeps of them. Frozen weights are left out.
torch's account of the parts is a pickle: it is read where its digest is that of a checkpoint which this training has
written.
"""

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tasks import atomic
from tasks.digest import digest_of
from tasks.parallel import whole
from tasks.parallel.whole import State

NONE: Mapping[str, str] = {}
NOTHING: State = {}
DAMAGED = "damaged checkpoint"
_METADATA = ".metadata"
# Each process reads by itself, and what a killed attempt has begun is begun anew.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
warnings.filterwarnings("ignore", "Detected an existing checkpoint")


@dataclass(frozen=True)
class Kept:
    """What a checkpoint holds of model and optimizer: this process's part of their ``tensors``, perhaps nothing.

    ``model`` and ``optimizer`` are what is left of both beside those, which every process has whole.
    """

    model: State
    optimizer: State
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Saved:
    """Where the tensors of model and optimizer lie, and what is left of both: see :class:`Kept`.

    Their names begin with ``prefix``.
    """

    folder: Path
    model: State
    optimizer: State
    prefix: str = ""


@dataclass(frozen=True)
class Parts:
    """What processes have written together: the digest of each file in ``folder``."""

    folder: Path
    digests: Mapping[str, str]


def kept(model: nn.Module, optimizer: torch.optim.Optimizer, copies: Mapping[str, str] = NONE) -> Kept:
    """Returns the state that lies in this process. ``copies``: what weights with another name are a copy of."""
    return Kept(_buffers(model), _groups(optimizer), _tensors(model, optimizer, copies))


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, copies: Mapping[str, str]) -> dict[str, torch.Tensor]:
    names = _names(model)
    found = {
        f"model.{name}": parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in copies
    }
    for parameter, entry in _entries(optimizer):
        if names[parameter] not in copies:
            found |= {f"optimizer.{names[parameter]}.{key}": value for key, value in entry.items()}
    return found


def _buffers(model: nn.Module) -> State:
    """Returns what ``model`` keeps beside its parameters, which every process has whole."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: whole.whole(value) for name, value in model.state_dict().items() if name not in parameters}


def _groups(optimizer: torch.optim.Optimizer) -> State:
    """Returns the settings of each group of parameters, which are the same on every mesh."""
    return {
        "param_groups": [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
    }


def share(found: dict[str, torch.Tensor], number: int, replicas: int) -> dict[str, torch.Tensor]:
    """Returns what of ``found``, which each of so many ``replicas`` has, the one of that ``number`` writes for all."""
    # By size, so that all copy and write about as much.
    names = sorted(found, key=lambda name: found[name].numel())
    return {name: found[name] for name in names[number::replicas]}


def staged(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a copy of ``found`` on the CPU."""
    copied: dict[str, torch.Tensor] = BlockingAsyncStager(cache_staged_state_dict=False).stage(found)
    return copied


def write(
    found: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup | None, own: State = NOTHING
) -> tuple[Parts, list[State]]:
    """Writes ``found`` of each process of ``group`` into ``folder``; returns the parts, and the ``own`` of each.

    Collective; None is this process alone. Raises :class:`tasks.errors.DiskFull` on all of them when one has no room
    left.
    """
    with atomic.disk_full_is_told(folder), _fault_told():
        save_parts(found, storage_writer=_Writer(folder), process_group=group, no_dist=group is None)
    rank = 0 if group is None else dist.get_rank(group)
    files = [*folder.glob(f"__{rank}_*"), *([] if rank else [folder / _METADATA])]
    told = [({file.name: digest_of(file) for file in files}, own)]
    if group is not None:
        told *= group.size()
        dist.all_gather_object(told, told[0], group=group)
    if not rank:
        # torch has synced the files, not that they are there.
        atomic.sync(folder)
    digests = dict(sorted(itertools.chain(*(digests.items() for digests, _ in told))))
    return Parts(folder, digests), [own for _, own in told]


@contextlib.contextmanager
def _fault_told() -> Iterator[None]:
    """Raises what went wrong in one of the processes: torch puts it into an exception that is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        fault: BaseException = next(iter(error.failures.values()))[0]
        raise fault from None


class _Writer(FileSystemWriter):
    """Tells what the disk said."""

    def __init__(self, folder: Path) -> None:
        # Nothing is copied ahead from a GPU: what is written lies on the CPU, and this thread has no device of its own.
        super().__init__(folder, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise atomic.said_by_the_disk(error) from None


def of_this_process(parts: Parts) -> Parts:
    """Returns those of ``parts`` that this process looks at: what each reads first, and some of the others.

    Of the rest it learns when all agree on a checkpoint.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    names = {_METADATA, *list(parts.digests)[rank::size]}
    return Parts(parts.folder, {name: digest for name, digest in parts.digests.items() if name in names})


def damaged(parts: Parts, moved: Callable[[], None]) -> tuple[Path, str] | None:
    """Returns a file of ``parts`` that is not what was written, and its fault; None: all are.

    ``moved`` is called again and again meanwhile.
    """
    for name, digest in parts.digests.items():
        file = parts.folder / name
        try:
            if not file.is_file() or digest_of(file, moved) != digest:
                return file, DAMAGED
        except OSError as error:
            return file, f"cannot be read ({error.strerror})"
    return None


def read(wanted: dict[str, torch.Tensor], folder: Path) -> None:
    """Overwrites ``wanted`` with what lies in ``folder`` under their names. Each process reads by itself."""
    if wanted:
        with _fault_told():
            load_parts(wanted, storage_reader=FileSystemReader(folder), no_dist=True)


@torch.no_grad()
def load(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Saved, copies: Mapping[str, str] = NONE) -> None:
    """Takes over what of ``saved`` this process needs, and reads no more."""
    kinds = FileSystemReader(saved.folder).read_metadata().state_dict_metadata
    names, every = _names(model), [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # A copy is read by itself: its original may lie here too, and another copy.
    wanted: dict[str, dict[str, torch.Tensor]] = {}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for parameter, name in names.items():
        place = wanted.setdefault(name if name in copies else "", {})
        name = copies.get(name, name)
        if parameter.requires_grad:
            place[f"{saved.prefix}model.{name}"] = parameter.detach()
        start = f"{saved.prefix}optimizer.{name}."
        entry = {key.removeprefix(start): _room(kinds[key], parameter) for key in kinds if key.startswith(start)}
        if entry:
            state[next(number for number, one in enumerate(every) if one is parameter)] = entry
            place |= {start + key: value for key, value in entry.items()}
    for place in wanted.values():
        read(place, saved.folder)
    settings = zip(saved.optimizer["param_groups"], optimizer.state_dict()["param_groups"], strict=True)
    optimizer.load_state_dict({"state": state, "param_groups": [_settings(group, own) for group, own in settings]})
    own = model.state_dict()
    for name, value in saved.model.items():
        own[name].copy_(value)


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _settings(saved: State, own: State) -> State:
    """Returns a group's ``own`` settings as they were ``saved``: another stage's group may have others besides."""
    return {**own, **{name: value for name, value in saved.items() if name in own}, "params": own["params"]}


def _entries(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, torch.Tensor]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, optimizer.state.get(parameter, {})


def _room(kind: STORAGE_TYPES, parameter: nn.Parameter) -> torch.Tensor:
    """Returns a tensor to read into, laid out as ``parameter`` is; a number belongs to it as a whole."""
    assert isinstance(kind, TensorStorageMetadata)
    if not kind.size:
        return torch.zeros((), dtype=kind.properties.dtype)
    return torch.zeros_like(parameter.detach(), dtype=kind.properties.dtype)
