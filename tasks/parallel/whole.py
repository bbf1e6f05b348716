"""Tensors that lie in parts over the processes, and the whole of them: at the start, for checkpoints, and norms.

What puts parts together is collective: each process calls it, for the same tensors in the same order.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lm.weights import Read, Region, whole_region

State = dict[str, Any]
"""What of a model, or of an optimizer, goes into a checkpoint."""


def gathered(value: torch.Tensor) -> torch.Tensor:
    """Returns ``value``, put together from its parts if it has any."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


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


def part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns what this process keeps of the whole ``value``, in the layout of ``like``."""
    if isinstance(like, DTensor):
        # Every process has read the whole, so that nothing has to be sent.
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device)


def frozen(model: nn.Module) -> set[str]:
    """Returns the names of the parameters of ``model`` that no gradient moves."""
    return {name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad}


def model_state(model: nn.Module, keep: bool, left_out: Collection[str] = ()) -> State:
    """Returns the whole state of ``model`` where it is to be kept, without the names ``left_out``.

    Tensors that are tied in it are one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {parameter for name, parameter in parameters.items() if name not in left_out}
    found = {parameter: _kept(parameter, keep) for parameter in model.parameters() if parameter in wanted}
    return {
        name: found[parameters[name]] if name in parameters else _kept(value, keep)
        for name, value in model.state_dict().items()
        if name not in left_out
    }


@torch.no_grad()
def load_model_state(model: nn.Module, state: State) -> None:
    """Takes over the whole ``state``, in which what is :func:`frozen` may be missing."""
    kept = frozen(model) - state.keys()
    for name, own in model.state_dict().items():
        if name not in kept:
            own.copy_(part(state[name], own))


def optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> State:
    """Returns ``optimizer.state_dict()`` with whole tensors where they are to be kept."""
    state = optimizer.state_dict()
    entries = {
        number: {key: _kept(value, keep) for key, value in own.items()} for number, own in state["state"].items()
    }
    return {**state, "state": entries}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Takes over what :func:`optimizer_state` returned, or the state of an optimizer over whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        # Scalars, such as the count of steps, belong to a parameter and not to its elements.
        number: {key: part(value, parameters[number]) if value.dim() else value for key, value in own.items()}
        for number, own in state["state"].items()
    }
    take_optimizer_state(optimizer, {**state, "state": entries})


def take_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Has ``optimizer`` load ``state`` and keep nothing of it, as it does of what lies on its parameters' device."""
    optimizer.load_state_dict(state)
    for own in optimizer.state.values():
        here = {key: value for key, value in own.items() if isinstance(value, torch.Tensor) and value.is_cpu}
        own.update({key: value.clone() for key, value in here.items()})


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


def _kept(value: Any, keep: bool) -> Any:
    # One tensor after the other: a process that keeps none has room for one.
    found = whole(value)
    return found if keep else None
