"""The quantized graphs that are scored: INT8, and what it would be without the steps that led to it."""

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
from tasks.evaluate.report import INT8, POST_TRAINING, ROUNDED


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
def graphs(model: LanguageModel) -> Iterator[dict[str, Path]]:
    """Yields the folder of each graph by its name in the report, while the context lasts. ``model`` is the float one.

    ``rounded`` is made here, and is there where the INT8 model was rotated or compensated; ``post_training``, which
    ``quantize`` has left, where it was fine-tuned. Raises :class:`BadInput` where ``quantize`` has not said, or left.
    """
    try:
        made = Made.model_validate_json(paths.QUANTIZATION.read_bytes())
        plan = PLANS[made.plan]
    except (FileNotFoundError, ValidationError, KeyError):
        raise BadInput(f"{paths.QUANTIZATION}: missing, or of another version. Rerun the stage 'quantize'.") from None
    folders = {INT8: paths.INT8}
    if made.fine_tuned:
        folders[POST_TRAINING] = paths.POST_TRAINING
        graph = paths.POST_TRAINING / paths.INT8_GRAPH.name
        if not graph.is_file():
            raise BadInput(f"{graph}: no such file. Rerun the stage 'quantize'.")
    if not (made.rotated or made.compensated):
        yield folders
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = Plan(plan.others, plan.head, made.in_float, made.ranges, made.routers, made.norms)
        onnx_model.export(model, plan, folder / paths.INT8_GRAPH.name)
        for beside in ("config.json", "tokenizer.json"):
            shutil.copy(paths.INT8 / beside, folder / beside)
        yield {**folders, ROUNDED: folder}
