"""The section ``train`` of ``params.yaml``."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from lm.config import GroupedArchitecture, LatentArchitecture
from tasks import init, paths
from tasks.mesh import MeshParams, check_fits, check_micro_batches
from tasks.training_params import TrainingParams


def checkpoint_inputs() -> list[Path]:
    """Returns the files that a checkpoint depends on, besides parameters and code.

    Raises :class:`tasks.errors.BadInput` where ``models/init`` is not what ``train.init`` says.
    """
    return [paths.MANIFEST, *([] if init.checkpoint() is None else [paths.INIT_RECORD])]


class TrainParams(TrainingParams):
    """Training from scratch, or on from the model that ``init`` names."""

    CUT: ClassVar[tuple[str, ...]] = (*TrainingParams.CUT, "mesh")

    init: str = Field(default=init.SCRATCH, min_length=1)
    seq_len: int = Field(ge=2)
    # None: that of the model that training starts from.
    model: Annotated[LatentArchitecture | GroupedArchitecture, Field(discriminator="model_type")] | None
    mesh: MeshParams

    @property
    def data_size(self) -> int:
        return self.mesh.over(self.world_size).data

    @model_validator(mode="after")
    def _there_is_a_model(self) -> Self:
        if self.model is None and self.init == init.SCRATCH:
            raise ValueError("model is null, but init: scratch needs one; describe it, or name a checkpoint in init")
        return self

    @model_validator(mode="after")
    def _the_optimizer_fits_the_mesh(self) -> Self:
        if self.optimizer == "muon" and not self.mesh.over(self.world_size).is_replicated:
            raise ValueError("optimizer muon takes whole matrices, and the mesh cuts them; set optimizer to adamw")
        return self

    @model_validator(mode="after")
    def _the_micro_batches_fit_the_mesh(self) -> Self:
        mesh = self.mesh.over(self.world_size)
        check_micro_batches(mesh, self.global_batch // (self.micro_batch * mesh.data))
        if mesh.schedule == "zero-bubble" and mesh.pipeline > 1 and self.activation_checkpointing != "none":
            raise ValueError(
                "mesh.pipeline_schedule zero-bubble computes gradients in two passes, and activation_checkpointing "
                f"{self.activation_checkpointing} keeps nothing for the second; set that to none, or take 1f1b"
            )
        return self

    @model_validator(mode="after")
    def _the_model_fits_the_mesh(self) -> Self:
        # That of a checkpoint is looked at when it has been read.
        if self.model is not None:
            check_fits(self.mesh.over(self.world_size), self.model)
        return self
