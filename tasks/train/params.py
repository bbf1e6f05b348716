"""The section ``train`` of ``params.yaml``."""

from pydantic import Field

from lm.config import Architecture
from tasks.training_params import TrainingParams


class TrainParams(TrainingParams):
    """Training from scratch."""

    seq_len: int = Field(ge=2)
    model: Architecture
