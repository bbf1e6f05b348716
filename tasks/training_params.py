"""The knobs of a distributed training run, shared by the sections ``train`` and ``quantize`` of ``params.yaml``."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.section import Section, operational


class TrainingParams(Section):
    """One run of the optimizer over shards."""

    seed: int = Field(ge=0, lt=2**63)
    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    min_learning_rate_ratio: float = Field(ge=0, le=1)
    warmup_fraction: float = Field(ge=0, le=1)
    weight_decay: float = Field(ge=0)
    clip_grad_norm: float = Field(gt=0)
    bias_update_rate: float = Field(ge=0)
    validate_every: int = Field(ge=1)
    validation_windows: int = Field(ge=1)
    device: Literal["cpu", "cuda"]
    precision: Literal["auto", "bf16", "fp32"]
    # The order of a sum depends on these two, so they are part of a version's identity.
    world_size: int = Field(ge=1, le=4096)
    threads_per_process: int = Field(ge=1, le=1024)
    checkpoint_every: int = operational(ge=1)

    @property
    def data_size(self) -> int:
        """Among how many the windows of a step are dealt out."""
        return self.world_size

    @model_validator(mode="after")
    def _the_batch_divides(self) -> Self:
        per_pass = self.micro_batch * self.data_size
        dealt_to = "world_size" if self.data_size == self.world_size else "world_size / mesh.tensor"
        if self.global_batch % per_pass:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} x "
                f"{dealt_to} {self.data_size}; make it {max(1, self.global_batch // per_pass) * per_pass}"
            )
        return self
