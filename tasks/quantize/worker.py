"""One quantizing process, as torchrun starts it. The first one exports the graph and audits it."""

from lm import hugging_face, onnx_model
from lm.hugging_face_files import COMPANIONS
from lm.model import LanguageModel
from lm.quantization import Plan, prepare
from tasks import atomic, inputs, paths, stage, world
from tasks.checkpoints import Checkpoints
from tasks.progress import Progress, progress
from tasks.quantize.audit import audit
from tasks.quantize.params import CHECKPOINT_INPUTS, QuantizeParams
from tasks.quantize.schemes import SCHEMES, Measure, Quantization, Trial, check_in_float, plan_of
from tasks.section import read_section
from tasks.shards import Shards, read_manifest
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
    checkpoints = Checkpoints("quantize", inputs.key("quantize", params, CHECKPOINT_INPUTS))
    if here.is_first:
        checkpoints.forget_others()
    model = hugging_face.load(paths.FLOAT)
    check_in_float(model, params)
    length = model.config.window
    read, held_out = (Shards(paths.SHARDS, manifest, split).reader(length) for split in ("train", "valid"))
    measure = Measure(model, held_out, params, here)
    trials: list[Trial] = []
    curve = Curve()
    for name in params.candidates:
        # Fine-tuning changes the weights, and comes last.
        prepare(model, plan_of(name, params))
        if SCHEMES[name].plan not in {SCHEMES[trial.scheme].plan for trial in trials}:
            trials.append(Trial(scheme=name, after="post-training", relative_loss=measure.relative_loss(model)))
        if SCHEMES[name].fine_tuned:
            curve = train(model, params, read, held_out, checkpoints, here, shown, "quantize")
            trials.append(Trial(scheme=name, after="fine-tuning", relative_loss=measure.relative_loss(model)))
        high = trials[-1].relative_loss.high
        if high is not None and high < params.max_relative_loss:
            break
    found = Quantization(
        asked=params.scheme, scheme=name, in_float=params.in_float, windows=measure.count, trials=tuple(trials)
    )
    return model, found, curve


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
    stage.run(main)
