"""The section ``train`` of ``params.yaml``."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from lm.config import GroupedArchitecture, LatentArchitecture
from tasks import paths
from tasks.mesh import MeshParams, check_fits
from tasks.training_params import TrainingParams

# What a checkpoint depends on besides parameters and code.
CHECKPOINT_INPUTS = (paths.MANIFEST,)


class TrainParams(TrainingParams):
    """Training from scratch."""

    seq_len: int = Field(ge=2)
    model: Annotated[LatentArchitecture | GroupedArchitecture, Field(discriminator="model_type")]
    mesh: MeshParams

    @property
    def data_size(self) -> int:
        return self.mesh.over(self.world_size).data

    @model_validator(mode="after")
    def _the_model_fits_the_mesh(self) -> Self:
        check_fits(self.mesh.over(self.world_size), self.model)
        return self
