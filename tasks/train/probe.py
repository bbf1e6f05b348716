"""How fast the processes reach each other: an all-reduce along each axis of the mesh, before training starts.

Bandwidth is nccl-tests' "bus bandwidth": an all-reduce of S bytes over n processes moves 2 (n - 1) / n x S through each
process's link (its PERFORMANCE.md), so that the number stands beside what the hardware promises, whatever n is.
"""

import contextlib
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from tasks import atomic, paths
from tasks.world import World

_ROUNDS = 5
# Large enough for bandwidth to count and not latency; on CPUs a second is over before much more.
_BYTES = {"cpu": 2**20, "cuda": 2**25}


@dataclass(frozen=True)
class Link:
    """What the first process met along ``axis``, whose groups all measured at the same time; medians of five rounds."""

    axis: str
    processes: int
    latency_us: float
    bandwidth_gb_s: float

    def __str__(self) -> str:
        speed = f"all-reduce {self.latency_us:,.0f} µs, bandwidth {self.bandwidth_gb_s:.3g} GB/s"
        return f"{self.axis} x{self.processes}: {speed}"


def measure(world: World) -> list[Link]:
    """Returns a :class:`Link` for each axis of more than one process. All processes have to call it."""
    axes: list[tuple[str, dist.ProcessGroup | None]] = []
    if world.mesh is None:
        axes.append(("replicate", None))
    else:
        mesh = world.mesh.experts
        axes += [(name, mesh[name].get_group()) for name in mesh.mesh_dim_names or ()]
    return [_link(axis, group, world.device) for axis, group in axes if dist.get_world_size(group) > 1]


def report(world: World, stage: str) -> None:
    """Measures; the first process tells it on stderr and in ``.overnight/measurements``, which no version holds."""
    links = measure(world)
    if not world.is_first:
        return
    for link in links:
        print(f"{stage:<9} {link}", file=sys.stderr, flush=True)
    path = paths.MEASUREMENTS / f"{stage}-communication.json"
    if links:
        atomic.write_json(path, [asdict(link) for link in links])
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _link(axis: str, group: dist.ProcessGroup | None, device: torch.device) -> Link:
    processes, size = dist.get_world_size(group), _BYTES[device.type]
    latency = _seconds(torch.zeros(1, device=device), group)
    bandwidth = 2 * (processes - 1) / processes * size / _seconds(torch.zeros(size // 4, device=device), group)
    return Link(axis, processes, round(latency * 1e6, 1), round(bandwidth / 1e9, 4))


def _seconds(values: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    # The first one opens the connections.
    dist.all_reduce(values, group=group)
    taken = []
    for _ in range(_ROUNDS):
        _synchronize(values.device)
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        _synchronize(values.device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
