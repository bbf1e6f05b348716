"""The section ``train`` of ``params.yaml``."""

from typing import Annotated

from pydantic import Field

from lm.config import GroupedArchitecture, LatentArchitecture
from tasks import paths
from tasks.training_params import TrainingParams

# What a checkpoint depends on besides parameters and code.
CHECKPOINT_INPUTS = (paths.MANIFEST,)


class TrainParams(TrainingParams):
    """Training from scratch."""

    seq_len: int = Field(ge=2)
    model: Annotated[LatentArchitecture | GroupedArchitecture, Field(discriminator="model_type")]
