"""The section ``train`` of ``params.yaml``."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from lm.config import GroupedArchitecture, LatentArchitecture
from tasks import init, paths
from tasks.mesh import AXES, MeshParams, check_fits
from tasks.section import Section
from tasks.training_params import TrainingParams


def checkpoint_inputs() -> list[Path]:
    """Returns the files that a checkpoint depends on, besides parameters and code.

    Raises :class:`tasks.errors.BadInput` where ``models/init`` is not what ``train.init`` says.
    """
    return [paths.MANIFEST, *([] if init.checkpoint() is None else [paths.INIT_RECORD])]


class LoraParams(Section):
    """Low-rank factors beside frozen weights: see :mod:`lm.low_rank`."""

    rank: int = Field(ge=1)
    # What the factors' product counts for, times rank.
    alpha: float = Field(gt=0)
    # Patterns of layers' names, whole (model.layers.0.self_attn.q_proj) or the last part (q_proj).
    targets: tuple[str, ...] = Field(strict=False, min_length=1)
    # Whether models/float/adapter keeps the factors too, as the peft library reads them.
    keep_adapter: bool


class TrainParams(TrainingParams):
    """Training from scratch, or on from the model that ``init`` names."""

    CUT: ClassVar[tuple[str, ...]] = (*TrainingParams.CUT, "mesh")

    init: str = Field(default=init.SCRATCH, min_length=1)
    seq_len: int = Field(ge=2)
    # None: that of the model that training starts from.
    model: Annotated[LatentArchitecture | GroupedArchitecture, Field(discriminator="model_type")] | None
    mesh: MeshParams
    # None: all weights are trained.
    lora: LoraParams | None = None

    @property
    def data_size(self) -> int:
        return self.mesh.over(self.world_size).data

    @model_validator(mode="after")
    def _there_is_a_model(self) -> Self:
        if self.model is None and self.init == init.SCRATCH:
            raise ValueError("model is null, but init: scratch needs one; describe it, or name a checkpoint in init")
        return self

    @model_validator(mode="after")
    def _lora_fits(self) -> Self:
        if self.lora is None:
            return self
        if self.init == init.SCRATCH:
            raise ValueError("lora adapts a model that is there, and init: scratch has none; name a checkpoint in init")
        if self.optimizer != "adamw":
            raise ValueError(f"lora trains with adamw, and optimizer is {self.optimizer}; set optimizer to adamw")
        axes = dict(zip(AXES, self.mesh.over(self.world_size).sizes, strict=True))
        if others := [axis for axis, size in axes.items() if size > 1 and axis not in ("replicate", "shard")]:
            raise ValueError(f"lora trains over replicate and shard alone; set mesh.{others[0]} to 1")
        return self

    @model_validator(mode="after")
    def _the_optimizer_fits_the_mesh(self) -> Self:
        if self.optimizer == "muon" and not self.mesh.over(self.world_size).is_replicated:
            raise ValueError("optimizer muon takes whole matrices, and the mesh cuts them; set optimizer to adamw")
        return self

    @model_validator(mode="after")
    def _the_model_fits_the_mesh(self) -> Self:
        # That of a checkpoint is looked at when it has been read.
        if self.model is not None:
            check_fits(self.mesh.over(self.world_size), self.model)
        return self
