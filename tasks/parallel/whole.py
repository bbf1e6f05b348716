"""Tensors that lie in parts over the processes, and the whole of them: at the start, and norms.

What puts parts together is collective: each process calls it, for the same tensors in the same order.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lm.weights import Read, Region, whole_region

State = dict[str, Any]
"""What of a model, or of an optimizer, goes into a checkpoint."""


def local(value: torch.Tensor) -> torch.Tensor:
    """Returns the part of ``value`` that this process has."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Any) -> Any:
    """Returns a copy of ``value`` on the CPU, put together from its parts if it has any."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def region_of(value: torch.Tensor) -> Region:
    """Returns which part of a tensor this process has."""
    if not isinstance(value, DTensor):
        return whole_region(value.shape)
    shape, start = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))


def filled(parameter: nn.Parameter, read: Read, device: torch.device) -> torch.Tensor:
    """Returns what this process keeps of a tensor, in the layout of ``parameter``, and reads no more than that."""
    own = read(region_of(parameter)).to(device)
    if not isinstance(parameter, DTensor):
        return own
    mesh, stride = parameter.device_mesh, parameter.stride()
    return DTensor.from_local(own, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=stride)


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    stages: dist.ProcessGroup | None = None,
    copies: Collection[nn.Parameter] = (),
) -> torch.Tensor:
    """Scales the gradients so that their norm over all of them is at most ``max_norm``; returns what it was.

    ``stages`` are the processes that have other parameters than this one. ``copies`` are parameters that count
    elsewhere already. torch's own takes only tensors of one mesh.
    """
    every = list(parameters)
    found = [(parameter, parameter.grad) for parameter in every if parameter.grad is not None]
    gradients = [gradient for _, gradient in found]
    # By the members of the groups: a process may know the same ones as several objects.
    squares: dict[tuple[tuple[int, ...], ...], tuple[torch.Tensor, tuple[dist.ProcessGroup, ...]]] = {}
    for parameter, gradient in found:
        if any(parameter is copy for copy in copies):
            continue
        groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            groups = tuple(
                mesh.get_group(axis) for axis, place in enumerate(gradient.placements) if not place.is_replicate()
            )
        square = torch.linalg.vector_norm(local(gradient), dtype=torch.float64).square()
        members = tuple(tuple(dist.get_process_group_ranks(group)) for group in groups)
        squares[members] = (squares[members][0] + square if members in squares else square, groups)
    for square, groups in squares.values():
        for group in groups:
            dist.all_reduce(square, group=group)
    if squares:
        square = torch.stack([square for square, _ in squares.values()]).sum()
    else:
        # Of a stage in which all is frozen.
        square = torch.zeros((), dtype=torch.float64, device=every[0].device)
    if stages is not None:
        dist.all_reduce(square, group=stages)
    norm = square.sqrt().float()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(scale)
    return norm
