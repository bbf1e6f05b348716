"""Whole tensors, one at a time, in the first process: it is sent what lies in others, and nobody else holds more."""

import functools

import torch
import torch.distributed as dist
from torch import nn

from lm.weights import tensor_of
from tasks.parallel import whole

# From where to where, in each dimension: a region that can be a key.
Bounds = tuple[tuple[int, int], ...]


class Gathered:
    """A model whose parts lie in several processes. Each of them calls everything here, in the same order."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        """``group``: all processes, of gloo, for what is sent comes from the CPU; None: the default group is that."""
        self._model, self._group = model, group
        self._here = dist.get_rank(group)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the parameter or buffer of that name, on the CPU of the first process; on ``meta`` in the others."""
        sources = self._sources[name]
        shape = [max(stop for _, stop in along) for along in zip(*sources, strict=True)]
        found = torch.empty(shape, device="meta" if self._here else "cpu")
        for bounds, rank in sources.items():
            if rank == self._here:
                part = whole.local(tensor_of(self._model, name)).detach().cpu().contiguous()
                if rank:
                    dist.send(part, group=self._group, group_dst=0)
            elif not self._here:
                part = torch.empty([stop - start for start, stop in bounds])
                dist.recv(part, group=self._group, group_src=rank)
            if not self._here:
                found[tuple(slice(*along) for along in bounds)] = part
        return found

    @functools.cached_property
    def _sources(self) -> dict[str, dict[Bounds, int]]:
        """For each tensor its parts, and of those that have one the first: replicas have the same."""
        model = self._model
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        own = {name: bounds for name, value in tensors.items() if (bounds := _bounds(value)) is not None}
        told: list[dict[str, Bounds]] = [{} for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(told, own, group=self._group)
        found: dict[str, dict[Bounds, int]] = {}
        for rank, parts in enumerate(told):
            for name, bounds in parts.items():
                found.setdefault(name, {}).setdefault(bounds, rank)
        return found


def _bounds(value: torch.Tensor) -> Bounds | None:
    region = whole.region_of(value)
    empty = any(part.start == part.stop for part in region)
    return None if empty else tuple((part.start, part.stop) for part in region)
