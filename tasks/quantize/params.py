"""The section ``quantize`` of ``params.yaml``."""

from typing import Literal

from pydantic import Field

from tasks import paths
from tasks.training_params import TrainingParams

# What a checkpoint depends on besides parameters and code.
CHECKPOINT_INPUTS = (paths.MANIFEST, paths.FLOAT / "model.safetensors")

SchemeName = Literal["dynamic", "static", "weight-only-8", "qat", "weight-only-4"]
# From the cheapest up. Not `dynamic`: blocks are nearer to float, and quicker where text is written.
AUTO: tuple[SchemeName, ...] = ("weight-only-8", "qat")


class QuantizeParams(TrainingParams):
    """The scheme, and the fine-tuning that some schemes need."""

    scheme: SchemeName | Literal["auto"]
    in_float: tuple[str, ...] = Field(strict=False)
    max_relative_loss: float
    rotate: bool
    compensate: bool
    calibration_windows: int = Field(ge=1)

    @property
    def candidates(self) -> tuple[SchemeName, ...]:
        """The schemes to try, in order."""
        return AUTO if self.scheme == "auto" else (self.scheme,)
