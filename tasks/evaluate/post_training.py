"""The float model rounded as the INT8 model is, but neither corrected nor fine-tuned: what those two are worth."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lm import onnx_model
from lm.config import FloatOrInt8
from lm.model import LanguageModel
from lm.quantization import PLANS, Plan
from lm.static import Range
from tasks import paths
from tasks.errors import BadInput


class Made(BaseModel):
    """The part of ``models/int8/quantization.json`` that says how the INT8 model was made."""

    model_config = ConfigDict(frozen=True)

    plan: str
    in_float: tuple[str, ...]
    routers: FloatOrInt8
    norms: FloatOrInt8
    ranges: dict[str, Range]
    rotated: bool
    compensated: bool
    fine_tuned: bool


@contextlib.contextmanager
def post_training(model: LanguageModel) -> Iterator[Path | None]:
    """Yields a folder with the graph of the float ``model`` under the plan of the INT8 model, while the context lasts.

    None where the INT8 model itself is nothing else. Raises :class:`BadInput` where ``quantize`` has not said.
    """
    try:
        made = Made.model_validate_json(paths.QUANTIZATION.read_bytes())
        plan = PLANS[made.plan]
    except (FileNotFoundError, ValidationError, KeyError):
        raise BadInput(f"{paths.QUANTIZATION}: missing, or of another version. Rerun the stage 'quantize'.") from None
    if not (made.rotated or made.compensated or made.fine_tuned):
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = Plan(plan.others, plan.head, made.in_float, made.ranges, made.routers, made.norms)
        onnx_model.export(model, plan, folder / paths.INT8_GRAPH.name)
        for beside in ("config.json", "tokenizer.json"):
            shutil.copy(paths.INT8 / beside, folder / beside)
        yield folder
