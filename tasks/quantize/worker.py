"""One quantizing process, as torchrun starts it. The first one exports the graph and audits it."""

import numpy as np
import torch

from lm import hugging_face, onnx_model
from lm.compensation import compensate
from lm.hugging_face_files import COMPANIONS
from lm.model import LanguageModel
from lm.quantization import Plan, prepare
from lm.rotation import rotate
from tasks import atomic, inputs, paths, stage, world
from tasks.checkpoints import Checkpoints
from tasks.progress import Progress, progress
from tasks.quantize.audit import audit
from tasks.quantize.params import CHECKPOINT_INPUTS, QuantizeParams
from tasks.quantize.schemes import SCHEMES, Measure, Quantization, Trial, check_in_float, plan_of
from tasks.section import read_section
from tasks.shards import Shards, WindowReader, read_manifest
from tasks.training import Curve, train
from tasks.world import World

COPIED = ("config.json", "tokenizer.json")


def main() -> None:
    params = read_section("quantize", QuantizeParams)
    with world.joined(params) as here, progress("quantize", here.is_first) as shown:
        model, found, curve = quantize(params, here, shown)
        if here.is_first:
            write(model.cpu(), plan_of(found.scheme, params), found, curve)


def quantize(params: QuantizeParams, here: World, shown: Progress) -> tuple[LanguageModel, Quantization, Curve]:
    """Returns the model of the first candidate that loses little enough, else that of the last one.

    A scheme that fine-tunes is measured before that too: the difference is what the fine-tuning is worth.
    """
    manifest = read_manifest()
    checkpoints = Checkpoints(
        "quantize", inputs.key("quantize", params, CHECKPOINT_INPUTS), params.keep_checkpoints, params.elastic
    )
    if here.is_first:
        checkpoints.forget_others()
    original = hugging_face.load(paths.FLOAT)
    check_in_float(original, params)
    length = original.config.window
    read, held_out = (Shards(paths.SHARDS, manifest, split).reader(length) for split in ("train", "valid"))
    measure = Measure(original, held_out, params, here)
    trials: list[Trial] = []
    curve = Curve()
    for name in params.candidates:
        model = rounded(hugging_face.load(paths.FLOAT), plan_of(name, params), params, read, here, shown)
        trials.append(measure.trial(name, "post-training", model))
        if SCHEMES[name].fine_tuned:
            curve = train(model, params, read, held_out, checkpoints, here, shown, "quantize")
            trials.append(measure.trial(name, "fine-tuning", model))
        high = trials[-1].relative_loss.high
        if high is not None and high < params.max_relative_loss:
            break
    found = Quantization(
        asked=params.scheme,
        scheme=name,
        plan=SCHEMES[name].plan,
        rotated=params.rotate,
        compensated=params.compensate,
        fine_tuned=SCHEMES[name].fine_tuned,
        in_float=params.in_float,
        windows=measure.count,
        trials=tuple(trials),
    )
    return model, found, curve


def rounded(
    model: LanguageModel, plan: Plan, params: QuantizeParams, windows: WindowReader, here: World, shown: Progress
) -> LanguageModel:
    """Prepares the float ``model`` for ``plan`` in place: its spaces turned and its weights rounded as params say."""
    if params.rotate:
        rotate(model)
    model.to(here.device)
    if not params.compensate:
        return prepare(model, plan)
    count = min(params.calibration_windows, len(windows))
    # Spread evenly over the training split. Every process does the same, so that no state has to be sent.
    chosen = torch.from_numpy(windows.batch(np.arange(count) * len(windows) // count)).to(here.device).long()
    shown.begin("rounding")
    return compensate(model, plan, chosen[:, :-1], lambda done, blocks: shown.update(done, blocks, "blocks"))


def write(model: LanguageModel, plan: Plan, found: Quantization, curve: Curve) -> None:
    """Writes the graph with what a program needs beside it, its audit, what was tried, and the fine-tuning's curve."""
    with atomic.folder(paths.INT8) as folder:
        graph = folder / paths.INT8_GRAPH.name
        onnx_model.export(model, plan, graph)
        report = audit(graph, model, plan)
        for name in (*COPIED, *(name for name in COMPANIONS if (paths.FLOAT / name).is_file())):
            (folder / name).write_bytes((paths.FLOAT / name).read_bytes())
        (folder / "curve.csv").write_text(curve.to_csv())
        atomic.write_json(folder / paths.AUDIT.name, report.model_dump())
        atomic.write_json(folder / paths.QUANTIZATION.name, found.model_dump())


if __name__ == "__main__":
    stage.run_rank(main)
