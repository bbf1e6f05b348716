"""Lets a module compute with the parts of its parameters that lie in this process, as if they were all there is."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


def cut(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Cuts the parameter ``name`` of ``module`` over the one axis of ``mesh``; each process holds the whole before."""
    value = getattr(module, name)
    part = distribute_tensor(value.detach(), mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(part, requires_grad=value.requires_grad))


@contextlib.contextmanager
def local_parameters(region: nn.Module) -> Iterator[None]:
    """Within, what was :func:`cut` below ``region`` reads as this process's part, a plain tensor."""
    shown: list[tuple[nn.Module, str]] = []
    try:
        for module in region.modules():
            for name, value in module.named_parameters(recurse=False):
                if isinstance(value, DTensor):
                    # An attribute of the instance goes before a parameter of the same name.
                    vars(module)[name] = value.to_local()
                    shown.append((module, name))
        yield
    finally:
        for module, name in shown:
            del vars(module)[name]
