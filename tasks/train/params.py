"""The section ``train`` of ``params.yaml``."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from lm.config import GroupedArchitecture, LatentArchitecture
from tasks import init, paths
from tasks.mesh import MeshParams, check_fits
from tasks.training_params import TrainingParams

# What a checkpoint depends on besides parameters and code.
CHECKPOINT_INPUTS = (paths.MANIFEST, paths.INIT_RECORD)


class TrainParams(TrainingParams):
    """Training from scratch, or on from the model that ``init`` names."""

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
    def _the_model_fits_the_mesh(self) -> Self:
        # That of a checkpoint is looked at when it has been read.
        if self.model is not None:
            check_fits(self.mesh.over(self.world_size), self.model)
        return self
