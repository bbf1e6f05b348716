"""Lets a module compute with the parts of its parameters that lie in this process, as if they were all there is."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor


def cut(module: nn.Module, name: str, mesh: DeviceMesh, *placements: Placement) -> None:
    """Cuts the parameter ``name`` of ``module`` over the axes of ``mesh``; each process holds the whole before."""
    value = getattr(module, name)
    part = distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)
    module.register_parameter(name, nn.Parameter(part, requires_grad=value.requires_grad))


@contextlib.contextmanager
def local_parameters(region: nn.Module) -> Iterator[None]:
    """Within, what was :func:`cut` below ``region`` reads as this process's part, a plain tensor.

    A parameter that is whole in each process takes part in what only a part of the axis computes: its gradients are
    summed over the axis.
    """
    shown: list[tuple[nn.Module, str]] = []
    try:
        for module in region.modules():
            for name, value in module.named_parameters(recurse=False):
                if isinstance(value, DTensor):
                    partial = [Partial() if place == Replicate() else place for place in value.placements]
                    # An attribute of the instance goes before a parameter of the same name.
                    vars(module)[name] = value.to_local(grad_placements=partial)
                    shown.append((module, name))
        yield
    finally:
        for module, name in shown:
            del vars(module)[name]
