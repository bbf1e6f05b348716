"""One training process, as torchrun starts it; the first one writes ``models/float``."""

import os
from pathlib import Path

from lm import hugging_face, low_rank
from lm.model import LanguageModel
from tasks import atomic, init, inputs, paths, stage, world
from tasks.checkpoints import Checkpoints
from tasks.progress import progress
from tasks.section import read_section
from tasks.shards import Shards, read_manifest
from tasks.train import probe, start
from tasks.train.params import TrainParams, checkpoint_inputs
from tasks.training import Curve, train


def main() -> None:
    params = read_section("train", TrainParams).on(int(os.environ["WORLD_SIZE"]))
    manifest = read_manifest()
    origin = init.checkpoint()
    key = inputs.key("train", params, checkpoint_inputs())
    checkpoints = Checkpoints("train", key, params.keep_checkpoints, params.elastic)
    timeout = params.communication.timeout_seconds
    with world.joined(params, params.mesh, timeout) as here, progress("train", here.is_first) as shown:
        probe.report(here, "train")
        if here.is_first:
            checkpoints.forget_others()
        model = start.load(origin, params, manifest)
        readers = [Shards(paths.SHARDS, manifest, split).reader(params.seq_len) for split in ("train", "valid")]
        curve = train(model, params, readers[0], readers[1], checkpoints, here, shown, "train", origin is not None)
        if here.is_first:
            write(model, curve, params, len(readers[0]), here.precision, origin)
        # On another machine, the stage has not ended before its files are there.
        here.lowest(0)


def write(
    model: LanguageModel, curve: Curve, params: TrainParams, windows: int, precision: str, origin: Path | None
) -> None:
    """Writes the model, its curve and the report of the training, which started from the checkpoint in ``origin``."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with atomic.folder(paths.FLOAT) as folder:
        if params.lora is not None:
            if params.lora.keep_adapter:
                low_rank.save(model, folder / paths.ADAPTER.name)
            low_rank.merge(model)
        hugging_face.save(model, paths.TOKENIZER, folder, origin)
    atomic.write_text(paths.CURVE, curve.to_csv())
    total, active = model.parameter_counts()
    tokens = params.steps * params.global_batch * params.seq_len
    report = {
        "parameters": total,
        "active_parameters": active,
        "steps": params.steps,
        "tokens": tokens,
        "epochs": round(params.steps * params.global_batch / windows, 3),
        "processes": params.world_size,
        "precision": precision,
        "train_loss": round(curve.last("train_loss"), 6),
        "valid_loss": round(curve.last("valid_loss"), 6),
        "expert_imbalance": round(curve.last("expert_imbalance"), 4),
        "skipped_steps": len(curve.skipped),
    }
    if precision == "fp16":
        report["overflowed_steps"] = curve.overflows
    if params.lora is not None:
        report["trained_parameters"] = trained
    if curve.processes != [params.world_size]:
        # What a rebuild would have to repeat (`elastic`).
        report["processes_in_turn"] = curve.processes
    if origin is not None:
        if curve.before is not None:
            report["valid_loss_before"] = round(curve.before, 6)
        report["started_from"] = init.read(origin).name
    atomic.write_json(paths.TRAIN_REPORT, report)


if __name__ == "__main__":
    stage.run_rank(main)
