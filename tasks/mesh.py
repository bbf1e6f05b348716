"""How the processes of a training share the work: one mesh of five axes, and what no mesh can be.

A process's place is counted with ``tensor`` innermost and ``pipeline`` outermost, so that those that talk most are
neighbours: ``rank = (((stage * replicas + replica) * shards + shard) * experts + expert) * tensors + tensor``. Those
along ``tensor`` and ``pipeline`` work on the same windows; every other axis takes windows of its own.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lm.config import Architecture, GroupedArchitecture, GroupedMixtureArchitecture, GroupedShape, LatentArchitecture
from tasks.section import Section

AXES = ("pipeline", "replicate", "shard", "expert", "tensor")
Size = Annotated[int, Field(ge=1, le=4096)]
Schedule = Literal["1f1b", "interleaved-1f1b", "zero-bubble"]


@dataclass(frozen=True)
class Mesh:
    """The length of each axis, and in which order a pipeline works."""

    pipeline: int
    replicate: int
    shard: int
    expert: int
    tensor: int
    schedule: Schedule = "1f1b"

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.pipeline, self.replicate, self.shard, self.expert, self.tensor

    @property
    def stages(self) -> int:
        """Into how many stages the layers are cut: a process has one of them, or two where they are interleaved."""
        return self.pipeline * (1 if self.schedule == "1f1b" or self.pipeline == 1 else 2)

    def process_of(self, stage: int) -> int:
        """Returns the place along ``pipeline`` of a stage. A zero-bubble pipeline goes there and back, in a V."""
        if self.schedule == "zero-bubble" and stage >= self.pipeline:
            return 2 * self.pipeline - 1 - stage
        return stage % self.pipeline

    @property
    def data(self) -> int:
        """How many processes, or groups of processes, take windows of their own."""
        return self.replicate * self.shard * self.expert

    @property
    def is_replicated(self) -> bool:
        """Whether every process holds the whole model."""
        return self.pipeline == self.shard == self.expert == self.tensor == 1

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(AXES, self.sizes, strict=True))


class MeshParams(Section):
    """The mesh as ``params.yaml`` has it. ``auto`` is what the other axes leave of ``world_size``."""

    pipeline: Size = 1
    pipeline_schedule: Schedule = "1f1b"
    replicate: Literal["auto"] | Size = "auto"
    shard: Size = 1
    expert: Size = 1
    tensor: Size = 1

    def over(self, world_size: int) -> Mesh:
        """Returns the mesh of ``world_size`` processes. Raises ValueError when they cannot be laid out so."""
        rest = self.pipeline * self.shard * self.expert * self.tensor
        asked = f"mesh: shard {self.shard} x expert {self.expert} x tensor {self.tensor}"
        if self.pipeline > 1:
            asked = asked.replace("mesh:", f"mesh: pipeline {self.pipeline} x")
        replicate = world_size // rest if self.replicate == "auto" else self.replicate
        if self.replicate == "auto" and world_size % rest:
            raise ValueError(
                f"{asked} takes {rest} processes or a multiple of that, and world_size is {world_size}; "
                f"set world_size to {max(1, world_size // rest) * rest}"
            )
        if replicate * rest != world_size:
            raise ValueError(
                f"{asked} x replicate {replicate} is {replicate * rest} processes, and world_size is "
                f"{world_size}; set world_size to {replicate * rest}, or replicate to auto"
            )
        return Mesh(self.pipeline, replicate, self.shard, self.expert, self.tensor, self.pipeline_schedule)


def check_fits(mesh: Mesh, model: Architecture) -> None:
    """Raises ValueError when ``model`` does not divide over ``mesh``."""
    if mesh.stages > model.num_hidden_layers:
        two = ", two a process with pipeline_schedule " + mesh.schedule if mesh.stages > mesh.pipeline else ""
        raise ValueError(
            f"mesh.pipeline {mesh.pipeline} makes {mesh.stages} stages{two}, and num_hidden_layers is "
            f"{model.num_hidden_layers}; lower mesh.pipeline"
        )
    _check_experts(mesh, model)
    _check_tensor(mesh.tensor, model)


def check_tokens(mesh: Mesh, seq_len: int) -> None:
    """Raises ValueError when a window of so many tokens does not divide over ``mesh``."""
    if seq_len % mesh.tensor:
        raise ValueError(
            f"seq_len {seq_len} does not divide over mesh.tensor {mesh.tensor}, which cuts tokens too; make it "
            f"{max(1, seq_len // mesh.tensor) * mesh.tensor}, or lower mesh.tensor"
        )


def check_micro_batches(mesh: Mesh, passes: int) -> None:
    """Raises ValueError when ``passes`` micro-batches a step are none that the schedule of a pipeline can deal out."""
    if mesh.pipeline == 1:
        return
    if passes < mesh.pipeline:
        raise ValueError(
            f"global_batch makes {passes} micro-batches for each pipeline, and mesh.pipeline {mesh.pipeline} takes as "
            f"many or more to keep its stages at work; lower micro_batch, or raise global_batch"
        )
    if mesh.schedule == "interleaved-1f1b" and passes % mesh.pipeline:
        raise ValueError(
            f"global_batch makes {passes} micro-batches for each pipeline, and pipeline_schedule interleaved-1f1b "
            f"takes a multiple of mesh.pipeline {mesh.pipeline}; change micro_batch or global_batch"
        )


def _check_experts(mesh: Mesh, model: Architecture) -> None:
    if mesh.expert == 1:
        return
    if isinstance(model, GroupedArchitecture) or (
        isinstance(model, LatentArchitecture)
        # The layers of multi-token prediction come after the others.
        and model.first_k_dense_replace == model.num_hidden_layers + model.num_nextn_predict_layers
    ):
        raise ValueError(
            f"mesh.expert is {mesh.expert}, and this model has no layer with experts; set mesh.expert to 1"
        )
    if model.n_routed_experts % mesh.expert:
        experts = "n_routed_experts" if isinstance(model, LatentArchitecture) else "num_experts"
        raise ValueError(
            f"{experts} {model.n_routed_experts} does not divide over mesh.expert {mesh.expert}; "
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


def _check_tensor(tensor: int, model: Architecture) -> None:
    cut = {"num_attention_heads": model.num_attention_heads}
    if isinstance(model, GroupedShape):
        cut["num_key_value_heads"] = model.num_key_value_heads
    if isinstance(model, LatentArchitecture | GroupedArchitecture):
        cut["intermediate_size"] = model.intermediate_size
    if isinstance(model, LatentArchitecture):
        cut["moe_intermediate_size x n_shared_experts"] = model.shared_size
    if isinstance(model, GroupedMixtureArchitecture):
        cut["shared_expert_intermediate_size"] = model.shared_size
    for name, size in cut.items():
        if size % tensor:
            raise ValueError(f"{name} {size} does not divide over mesh.tensor {tensor}; lower mesh.tensor")
