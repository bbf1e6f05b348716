"""The section ``quantize`` of ``params.yaml``."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from lm.config import Architecture, FloatOrInt8, without_further
from lm.hugging_face_files import weight_files
from lm.layer_names import last_part, layer_names
from tasks import paths
from tasks.mesh import check_fits
from tasks.training_params import TrainingParams


def checkpoint_inputs() -> list[Path]:
    """Returns the files that a checkpoint depends on, besides parameters and code.

    Raises :class:`lm.hugging_face_config.Unusable` where there is no model.
    """
    return [paths.MANIFEST, *weight_files(paths.FLOAT)]


SchemeName = Literal["dynamic", "static", "weight-only-8", "qat", "weight-only-4"]
# From the cheapest up. Not `dynamic`: blocks are nearer to float, and quicker where text is written.
AUTO: tuple[SchemeName, ...] = ("weight-only-8", "qat")


Objective = Literal["text", "float"]


class QuantizeParams(TrainingParams):
    """The scheme, and the fine-tuning that some schemes need."""

    scheme: Literal["dynamic", "static", "weight-only-8", "qat", "weight-only-4", "auto"]
    in_float: tuple[str, ...] = Field(strict=False)
    routers: FloatOrInt8 = "float"
    norms: FloatOrInt8 = "float"
    max_relative_loss: float
    rotate: bool
    compensate: bool
    calibration_windows: int = Field(ge=1)
    # What fine-tuning goes by: the text, or the float model's own predictions.
    objective: Objective = "text"

    @model_validator(mode="after")
    def _the_mesh_fits(self) -> Self:
        if self.mesh.tensor > 1:
            raise ValueError(
                f"mesh.tensor {self.mesh.tensor} would round parts of products, and the graph rounds whole ones; set "
                "it to 1, and cut by mesh.shard"
            )
        if self.mesh.pipeline > 1 and self.objective == "float":
            raise ValueError(
                f"objective float compares whole models, and mesh.pipeline {self.mesh.pipeline} cuts them into stages; "
                "set it to 1, and cut by mesh.shard, or objective to text"
            )
        return self

    def misfit(self, shape: Architecture) -> str | None:
        """Returns what is told of parameters that a model of ``shape`` does not fit, None where it fits all."""
        try:
            check_fits(self.layout, without_further(shape))
        except ValueError as error:
            return f"quantize: {error}."
        names = [*layer_names(shape)]
        for pattern in self.in_float:
            if not any(fnmatchcase(name, pattern) for name in names):
                ends = ", ".join(sorted(set(map(last_part, names))))
                return (
                    f"quantize.in_float: no layer's name matches '{pattern}'. Names are {names[1]} and so on, and end "
                    f"in one of {ends}; * stands for anything."
                )
        return None

    @property
    def candidates(self) -> tuple[SchemeName, ...]:
        """The schemes to try, in order."""
        return AUTO if self.scheme == "auto" else (self.scheme,)
