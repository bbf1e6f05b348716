"""How the processes of a training share the work: one mesh of four axes, and what no mesh can be.

A process's place is counted with ``tensor`` innermost, so that those that talk most are neighbours:
``rank = ((replicate * shards + shard) * experts + expert) * tensors + tensor``. Every axis but ``tensor`` takes windows
of its own.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lm.config import GroupedArchitecture, LatentArchitecture
from tasks.section import Section

AXES = ("replicate", "shard", "expert", "tensor")
Size = Annotated[int, Field(ge=1, le=4096)]


@dataclass(frozen=True)
class Mesh:
    """The length of each axis."""

    replicate: int
    shard: int
    expert: int
    tensor: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.replicate, self.shard, self.expert, self.tensor

    @property
    def data(self) -> int:
        """How many processes, or groups of processes, take windows of their own."""
        return self.replicate * self.shard * self.expert

    @property
    def is_replicated(self) -> bool:
        """Whether every process holds the whole model."""
        return self.shard == self.expert == self.tensor == 1

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(AXES, self.sizes, strict=True))


class MeshParams(Section):
    """The mesh as ``params.yaml`` has it. ``auto`` is what the other axes leave of ``world_size``."""

    replicate: Literal["auto"] | Size = "auto"
    shard: Size = 1
    expert: Size = 1
    tensor: Size = 1

    def over(self, world_size: int) -> Mesh:
        """Returns the mesh of ``world_size`` processes. Raises ValueError when they cannot be laid out so."""
        rest = self.shard * self.expert * self.tensor
        asked = f"mesh: shard {self.shard} x expert {self.expert} x tensor {self.tensor}"
        if self.replicate == "auto":
            if world_size % rest:
                raise ValueError(
                    f"{asked} takes {rest} processes or a multiple of that, and world_size is {world_size}; "
                    f"set world_size to {max(1, world_size // rest) * rest}"
                )
            return Mesh(world_size // rest, self.shard, self.expert, self.tensor)
        if self.replicate * rest != world_size:
            raise ValueError(
                f"{asked} x replicate {self.replicate} is {self.replicate * rest} processes, and world_size is "
                f"{world_size}; set world_size to {self.replicate * rest}, or replicate to auto"
            )
        return Mesh(self.replicate, self.shard, self.expert, self.tensor)


def check_fits(mesh: Mesh, model: LatentArchitecture | GroupedArchitecture) -> None:
    """Raises ValueError when ``model`` does not divide over ``mesh``."""
    _check_experts(mesh, model)
    _check_tensor(mesh.tensor, model)


def _check_experts(mesh: Mesh, model: LatentArchitecture | GroupedArchitecture) -> None:
    if mesh.expert == 1:
        return
    if isinstance(model, GroupedArchitecture) or model.first_k_dense_replace == model.num_hidden_layers:
        raise ValueError(
            f"mesh.expert is {mesh.expert}, and this model has no layer with experts; set mesh.expert to 1"
        )
    if model.n_routed_experts % mesh.expert:
        raise ValueError(
            f"n_routed_experts {model.n_routed_experts} does not divide over mesh.expert {mesh.expert}; "
            "make one a multiple of the other"
        )
    # With the experts over one axis, what is left of each is cut along its next dimension, in equal parts.
    for name, size in (
        ("hidden_size", model.hidden_size),
        ("2 x moe_intermediate_size", 2 * model.moe_intermediate_size),
    ):
        if size % mesh.shard:
            raise ValueError(
                f"{name} {size} does not divide over mesh.shard {mesh.shard}, as it must with mesh.expert above 1; "
                "lower mesh.shard"
            )


def _check_tensor(tensor: int, model: LatentArchitecture | GroupedArchitecture) -> None:
    cut = {"num_attention_heads": model.num_attention_heads, "intermediate_size": model.intermediate_size}
    if isinstance(model, GroupedArchitecture):
        cut["num_key_value_heads"] = model.num_key_value_heads
    else:
        cut["moe_intermediate_size x n_shared_experts"] = model.moe_intermediate_size * model.n_shared_experts
    for name, size in cut.items():
        if size % tensor:
            raise ValueError(f"{name} {size} does not divide over mesh.tensor {tensor}; lower mesh.tensor")
