"""What replicas exchange beside what a backward pass sums, and what that leaves in a checkpoint.

Most trainings have nothing here. :class:`tasks.parallel.compressed.Compressed` exchanges gradients in fewer bytes,
:class:`tasks.parallel.diloco.Diloco` exchanges the differences that many steps have made.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import nn

from tasks.world import World


class Exchange:
    """Nothing more than what the backward pass sums."""

    def __init__(self, world: World) -> None:
        self.near = world
        """Those that take each step together: all processes, or the replica of this one."""
        self.prefix = ""
        """With what the names begin, in a checkpoint, of the tensors that only this replica has."""
        self.apart = False
        """Whether replicas know nothing of each other between steps for which they are :meth:`due`."""

    def reduce(self, loss: torch.Tensor) -> None:
        """Averages the gradients over the processes, after the last backward pass of a step with that ``loss``.

        Leaves all as it was, and gradients that are not finite, where any process has one or such a loss.
        """

    def due(self, done: int, steps: int) -> bool:
        """Returns whether the replicas, having taken ``done`` of ``steps``, have to :meth:`meet`."""
        return False

    def meet(self, statistics: torch.Tensor) -> torch.Tensor:
        """Makes the weights of all replicas equal; returns the mean of their ``statistics`` [n], float64."""
        return statistics

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what this process writes of the exchange into a checkpoint. Collective."""
        return {}

    def load_state(self, folder: Path) -> None:
        """Takes over what lies in ``folder`` of what all processes' :meth:`state` has been."""


def averaged(
    tensors: list[torch.Tensor], processes: int, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the means of ``tensors`` over the ``processes`` of ``group``: one buffer, and its parts. Collective."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= processes
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return flat, [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def equal_weights(model: nn.Module, world: World) -> bool:
    """Returns whether all processes have the same weights, bit for bit. Collective."""
    whole = xxhash.xxh3_64()
    for value in model.state_dict().values():
        whole.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    number = whole.intdigest() >> 2
    lowest, highest = world.lowest(number), -world.lowest(-number)
    return lowest == highest
