"""The knobs of a distributed training run, shared by the sections ``train`` and ``quantize`` of ``params.yaml``."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tasks.exchange_params import ExchangeParams
from tasks.mesh import Mesh, MeshParams, check_micro_batches
from tasks.section import Section, operational


class TrainingParams(Section):
    """One run of the optimizer over shards."""

    CUT: ClassVar[tuple[str, ...]] = ("world_size", "threads_per_process", "mesh")

    seed: int = Field(ge=0, lt=2**63)
    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    optimizer: Literal["adamw", "muon"]
    learning_rate: float = Field(gt=0)
    muon_learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "linear", "wsd"]
    decay_fraction: float = Field(gt=0, le=1)
    min_learning_rate_ratio: float = Field(ge=0, le=1)
    warmup_fraction: float = Field(ge=0, le=1)
    weight_decay: float = Field(ge=0)
    clip_grad_norm: float = Field(gt=0)
    bias_update_rate: float = Field(ge=0)
    balance_loss_weight: float = Field(default=0.0, ge=0)
    validate_every: int = Field(ge=1)
    validation_windows: int = Field(ge=1)
    device: Literal["cpu", "cuda"]
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    # The order of a sum depends on these three, so they are part of a version's identity.
    world_size: int = Field(ge=1, le=4096)
    threads_per_process: int = Field(ge=1, le=1024)
    mesh: MeshParams
    # Gradients keep their bits.
    activation_checkpointing: Literal["none", "selective", "full"] = operational()
    checkpoint_every: int = operational(ge=1)
    elastic: bool = operational(default=False)
    max_skipped_steps: int = operational(default=3, ge=0)
    hang_timeout_seconds: float = operational(default=600.0, gt=0, le=1e7)
    # Clouds give 30 s and more between the notice and the end.
    stop_seconds: float = operational(default=20.0, gt=0, le=1e7)
    keep_checkpoints: int = operational(default=2, ge=1)

    @property
    def data_size(self) -> int:
        """Among how many the windows of a step are dealt out."""
        return self.layout.data

    @property
    def layout(self) -> Mesh:
        """How the processes share the model."""
        return self.mesh.over(self.world_size)

    @property
    def exchange(self) -> ExchangeParams:
        """What replicas exchange instead of whole gradients in each step."""
        return ExchangeParams()

    @property
    def compiles(self) -> bool:
        """Whether the model's layers are compiled."""
        return False

    @model_validator(mode="after")
    def _the_batch_divides(self) -> Self:
        per_pass = self.micro_batch * self.data_size
        dealt_to = "world_size" if self.data_size == self.world_size else "world_size / (mesh.tensor x mesh.pipeline)"
        if self.global_batch % per_pass:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} x "
                f"{dealt_to} {self.data_size}; make it {max(1, self.global_batch // per_pass) * per_pass}"
            )
        return self

    @model_validator(mode="after")
    def _the_micro_batches_fit_the_mesh(self) -> Self:
        mesh = self.layout
        check_micro_batches(mesh, self.global_batch // (self.micro_batch * mesh.data))
        if mesh.schedule == "zero-bubble" and mesh.pipeline > 1 and self.activation_checkpointing != "none":
            raise ValueError(
                "mesh.pipeline_schedule zero-bubble computes gradients in two passes, and activation_checkpointing "
                f"{self.activation_checkpointing} keeps nothing for the second; set that to none, or take 1f1b"
            )
        return self

    @model_validator(mode="after")
    def _the_schedule_fits(self) -> Self:
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            room = 1 - self.warmup_fraction
            cure = f"lower decay_fraction to {room:g}" if room else "lower warmup_fraction"
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} are more than all "
                f"steps; {cure}"
            )
        return self
