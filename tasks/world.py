"""The processes that train together: who this one is, what it computes on, and how numbers are summed over all."""

import contextlib
import ctypes
import dataclasses
import logging
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tasks import heartbeat, native, paths
from tasks.errors import EXIT_PEER_LOST, BadParameter, TryAgain, UserMistake
from tasks.mesh import AXES, Mesh, MeshParams
from tasks.parallel import traffic
from tasks.training_params import TrainingParams

PRODUCT_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_SECONDS_TO_TELL = 1.0
_SECONDS_OF_PATIENCE = 1800.0
# Beside other work, processes are not there at once.
_LEAST_SECONDS_TO_JOIN = 60.0


@dataclass(frozen=True)
class Meshes:
    """The same processes, seen three ways; the axes are those of :mod:`tasks.mesh`.

    Each begins with ``pipeline`` and ends with ``tensor``. data: between them ``data`` (all that take windows of their
    own). dense: ``replicate`` x ``dense`` (over which the weights outside the experts are cut: ``shard`` x ``expert``).
    experts: ``replicate`` x ``shard`` x ``expert``.

    ``patience`` is the timeout of all groups, None torch's own.
    """

    layout: Mesh
    data: DeviceMesh
    dense: DeviceMesh
    experts: DeviceMesh
    patience: timedelta | None = None


@dataclass(frozen=True)
class World:
    """One process's place among ``size`` processes.

    ``mesh`` is None where every process holds the whole model. ``writers`` are all processes once more, for what they
    say to each other about a checkpoint while training goes on, and send the first one at its end; None where there is
    one.
    """

    rank: int
    size: int
    device: torch.device
    precision: str
    mesh: Meshes | None = None
    writers: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Among how many the windows of a step are dealt out: the processes along ``tensor`` compute the same ones."""
        return self.size if self.mesh is None else self.mesh.data["data"].size()

    @property
    def data_rank(self) -> int:
        return self.rank if self.mesh is None else self.mesh.data["data"].get_local_rank()

    @property
    def stages_group(self) -> dist.ProcessGroup | None:
        """The processes of this one's pipeline, each with other layers; None where each has all of them."""
        if self.mesh is None or self.mesh.layout.pipeline == 1:
            return None
        return self.mesh.data["pipeline"].get_group()

    def autocast(self) -> AbstractContextManager[None]:
        """The precision's type for matrix products, and nothing where that is fp32."""
        return torch.autocast(self.device.type, PRODUCT_TYPES[self.precision], enabled=self.precision != "fp32")

    def lowest(self, value: int) -> int:
        """Returns the lowest ``value`` of all processes."""
        held = torch.tensor(value, device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MIN)
        return int(held)

    def of_all(self, value: int) -> list[int]:
        """Returns the ``value`` of each process, by rank."""
        values = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        found: list[int] = self.sum_all(values).tolist()
        return found

    def unlike_first(self, text: str) -> list[int]:
        """Returns the ranks of those that have another ``text`` than the first process."""
        found = self.of_all(zlib.crc32(text.encode()))
        return [rank for rank, one in enumerate(found) if one != found[0]]

    def fail(self, error: UserMistake | TryAgain) -> NoReturn:
        """Ends all processes, which have all met ``error``; the first one tells it."""
        if self.is_first:
            raise error
        # Whoever ends first takes the others along.
        time.sleep(_SECONDS_TO_TELL)
        sys.exit(error.exit_code)

    def sum_all(self, values: torch.Tensor) -> torch.Tensor:
        """Sums ``values`` over all processes, in place."""
        dist.all_reduce(values)
        return values

    def from_first(self, value: torch.Tensor) -> torch.Tensor:
        """Overwrites ``value``, which lies on the CPU, with what the first process has."""
        dist.broadcast(value, group=self.writers, group_src=0)
        return value

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums ``values`` over all processes that take windows of their own, in place, and over a pipeline's stages.

        Of a pipeline, what one stage knows is 0 in the others.
        """
        dist.all_reduce(values, group=None if self.mesh is None else self.mesh.data["data"].get_group())
        if self.stages_group is not None:
            dist.all_reduce(values, group=self.stages_group)
        return values


@contextlib.contextmanager
def joined(
    params: TrainingParams,
    mesh: MeshParams = MeshParams(),  # noqa: B008
    timeout_seconds: float | None = None,
) -> Iterator[World]:
    """Yields this process's :class:`World`, joined to the others that were started with it.

    ``timeout_seconds``: of a collective; None: half an hour, or twice what a hanging step may take.
    """
    rank = int(os.environ["RANK"])
    die_with_parent()
    tell_apart(rank)
    traffic.record()
    torch.set_num_threads(params.threads_per_process)
    native.compute_repeatably()
    device = torch.device(params.device)
    if params.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The heartbeat of a training knows more than the group, so it has to be the first to lose patience.
    usual = max(_SECONDS_OF_PATIENCE, 2 * params.hang_timeout_seconds)
    patience = timedelta(seconds=usual if timeout_seconds is None else timeout_seconds)
    size = int(os.environ["WORLD_SIZE"])
    try:
        # Another one that has joined may have found a mistake, and be gone, before all have.
        with heartbeat.joining(rank, size, max(params.hang_timeout_seconds, _LEAST_SECONDS_TO_JOIN)):
            dist.init_process_group("nccl" if params.device == "cuda" else "gloo", timeout=patience)
            here = World(rank, size, device, resolve_precision(params))
            _check_alike(here, mesh)
            meshes = device_mesh(mesh.over(size), device, patience)
            here = dataclasses.replace(here, mesh=meshes, writers=all_again(size, patience))
        yield here
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        print(f"warning: rank {rank}: another process is gone: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_PEER_LOST)
    # A process that fails leaves the group by its end, since there may be nobody left to take leave of.
    dist.destroy_process_group()


def _is_lost_peer(error: RuntimeError) -> bool:
    # gloo has only the words.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def device_mesh(mesh: Mesh, device: torch.device, patience: timedelta | None = None) -> Meshes | None:
    """Returns torch's meshes for ``mesh``, or None where there is nothing but replicas."""
    if mesh.is_replicated:
        return None
    # It warns of each tensor that two axes cut and that takes two gathers: in checkpoints, where speed is no matter.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    processes = init_device_mesh(device.type, (math.prod(mesh.sizes),), mesh_dim_names=("world",))
    return seen(processes, mesh, patience)


def all_again(size: int, patience: timedelta | None) -> dist.ProcessGroup | None:
    """Returns a group of gloo's of all ``size`` processes, or None where there is one."""
    return dist.new_group(backend="gloo", timeout=patience) if size > 1 else None


def seen(processes: DeviceMesh, mesh: Mesh, patience: timedelta | None) -> Meshes:
    """Returns ``processes``, one axis of torch's, as ``mesh`` sees them."""
    cut = mesh.shard * mesh.expert
    meshes = Meshes(
        layout=mesh,
        data=processes._unflatten(0, (mesh.pipeline, mesh.data, mesh.tensor), ("pipeline", "data", "tensor")),
        dense=processes._unflatten(
            0, (mesh.pipeline, mesh.replicate, cut, mesh.tensor), ("pipeline", "replicate", "dense", "tensor")
        ),
        experts=processes._unflatten(0, mesh.sizes, AXES),
        patience=patience,
    )
    for one in (meshes.data, meshes.dense, meshes.experts):
        be_patient(one, patience)
    return meshes


def be_patient(mesh: DeviceMesh, patience: timedelta | None) -> None:
    """Gives the groups of all axes the timeout ``patience``: they are made with torch's, NCCL's ten minutes."""
    if patience is not None:
        for group in mesh.get_all_groups():
            # Not torch's _set_pg_timeout, which does nothing and warns where debug detail wraps gloo's groups.
            group.set_timeout(patience)


def resolve_precision(params: TrainingParams) -> str:
    """Returns bf16, fp16 or fp32: what ``precision`` says, or for ``auto`` what the hardware multiplies fastest."""
    if params.precision != "auto":
        return params.precision
    if params.device == "cuda":
        # Older GPUs emulate it.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def _check_alike(here: World, mesh: MeshParams) -> None:
    """Ends all where they would make other groups, and wait in them, or would not compute in one precision."""
    if others := here.unlike_first(mesh.model_dump_json()):
        told = f"the mesh of {heartbeat.ranks(others)} is not that of rank 0; all machines need the same {paths.PARAMS}"
        here.fail(BadParameter(f"{paths.PARAMS}: {told}."))
    names = [*PRODUCT_TYPES]
    found = here.of_all(names.index(here.precision))
    if len(set(found)) > 1:
        each = ", ".join(f"{names[number]} on rank {found.index(number)}" for number in sorted(set(found)))
        here.fail(
            BadParameter(
                f"{paths.PARAMS}: precision is {each}: where it is auto, their processors are not alike. Set it to the "
                "one in which all are to compute."
            )
        )


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when the one that started it, ``parent``, ends.

    Each process of a training has a session of its own: a SIGKILL to its launcher would leave it at work.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        # It has ended already.
        os.kill(os.getpid(), signal.SIGKILL)


def tell_apart(rank: int) -> None:
    """Names this process in ``ps`` and ``top``, where the command lines of all are the same."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"rank {rank}".encode())
