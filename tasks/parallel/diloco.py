"""Replicas that train apart for many steps, then exchange what these have changed (DiLoCo, arXiv 2311.08105).

The mean of the differences is the gradient of an outer optimizer, SGD with Nesterov's momentum, which moves the weights
that all had when they last met. A replica may be cut over several processes (FSDP2), of which each exchanges its part
with those in its place in the other replicas. Replicas meet every ``inner_steps`` and after the last step; only then is
anything validated. Where one is told to end, all stop between two meetings, if the slowest takes its steps in time. A
checkpoint holds each replica's weights and moments, and what they last met with. The differences may be sent as bytes
(``train.compression: int8``).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lm.model import LanguageModel
from tasks.exchange_params import DilocoParams
from tasks.mesh import MeshParams
from tasks.parallel import parts, whole
from tasks.parallel.compressed import averaged_in_bytes
from tasks.parallel.exchange import Exchange, averaged
from tasks.parallel.parts import Saved
from tasks.world import World, be_patient, seen

# With what the names of what all replicas have in common begin.
_OUTER = "outer."


@dataclass(frozen=True)
class Replica(World):
    """The processes of one replica, as if there were no others. ``rank`` and ``size`` count within it."""

    number: int = 0
    replicas: int = 1
    group: dist.ProcessGroup | None = None
    """Those of this replica; None where this process is all of it."""
    twins: dist.ProcessGroup | None = None
    """Those that have the same place in each replica; None stands for all processes."""

    def lowest(self, value: int) -> int:
        held = torch.tensor(value, device=self.device)
        if self.group is not None:
            dist.all_reduce(held, dist.ReduceOp.MIN, group=self.group)
        return int(held)

    def sum_all(self, values: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        # The inherited one would go over all replicas.
        return self.sum_all(values)


def replica_of(world: World) -> Replica:
    """Returns this process's replica: itself, or those that ``shard`` cuts a model over."""
    if world.mesh is None:
        return Replica(
            rank=0, size=1, device=world.device, precision=world.precision, number=world.rank, replicas=world.size
        )
    replicas, cut = world.mesh.dense["replicate"].size(), world.mesh.dense["dense"].size()
    processes = init_device_mesh(world.device.type, (replicas, cut), mesh_dim_names=("replicas", "cut"))
    patience = world.mesh.patience
    be_patient(processes, patience)
    inside = processes["cut"]
    number, rank = divmod(world.rank, cut)
    return Replica(
        rank=rank, size=cut, device=world.device, precision=world.precision,
        mesh=seen(inside, MeshParams(shard=cut).over(cut), patience), writers=world.writers,
        number=number, replicas=replicas, group=inside.get_group(), twins=processes["replicas"].get_group(),
    )  # fmt: skip


class Diloco(Exchange):
    """The outer optimizer."""

    def __init__(
        self, model: LanguageModel, near: Replica, world: World, params: DilocoParams, in_bytes: bool = False
    ) -> None:
        """``in_bytes``: what is exchanged is rounded to bytes."""
        super().__init__(near)
        self._replica, self._every, self._in_bytes = near, params.inner_steps, in_bytes
        self.apart = True
        self.prefix = f"replica-{near.number}."
        # What is frozen differs nowhere.
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._biases = [
            router.e_score_correction_bias for router in model.routers() if router.e_score_correction_bias is not None
        ]
        self._anchors = nn.ParameterList(nn.Parameter(parameter.detach().clone()) for parameter in self._parameters)
        momentum = params.outer_momentum
        self._outer = torch.optim.SGD(
            self._anchors, lr=params.outer_learning_rate, momentum=momentum, nesterov=momentum > 0, foreach=False
        )

    def due(self, done: int, steps: int) -> bool:
        return done % self._every == 0 or done == steps

    @torch.no_grad()
    def meet(self, statistics: torch.Tensor) -> torch.Tensor:
        differences = [
            whole.local(anchor) - whole.local(own) for anchor, own in zip(self._anchors, self._parameters, strict=True)
        ]
        for difference, mean in zip(differences, self._means_of_differences(differences), strict=True):
            difference.copy_(mean)
        *biases, statistics = self._means([*self._biases, statistics])
        for bias, mean in zip(self._biases, biases, strict=True):
            bias.copy_(mean)
        for anchor, difference in zip(self._anchors, differences, strict=True):
            anchor.grad = _like(difference, anchor)
        self._outer.step()
        self._outer.zero_grad()
        for anchor, own in zip(self._anchors, self._parameters, strict=True):
            whole.local(own).copy_(whole.local(anchor))
        return statistics

    def _means_of_differences(self, differences: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._in_bytes:
            # Without error feedback, which each process of a replica would have to keep in its part of a checkpoint:
            # AdamW's differences are of like size, and the loss does not suffer from what is lost.
            return averaged_in_bytes(differences, self._replica.replicas, self._replica.twins)
        return self._means(differences)

    def _means(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return averaged(tensors, self._replica.replicas, self._replica.twins)[1]

    def state(self) -> dict[str, torch.Tensor]:
        kept = parts.kept(self._anchors, self._outer).tensors
        named = {f"{_OUTER}{name}": value for name, value in kept.items()}
        return parts.share(named, self._replica.number, self._replica.replicas)

    def load_state(self, folder: Path) -> None:
        parts.load(self._anchors, self._outer, Saved(folder, {}, self._outer.state_dict(), _OUTER))


def _like(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
