"""One training process, as :mod:`tasks.launch` or torchrun starts it; the first one writes ``models/float``."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from lm import hugging_face, low_rank
from lm.model import LanguageModel
from lm.weights import Weights, Whole, fill, on_meta
from tasks import atomic, heartbeat, init, inputs, paths, stage, world
from tasks.checkpoints import Checkpoints
from tasks.curve import Curve
from tasks.errors import BadInput
from tasks.heartbeat import ranks
from tasks.parallel.parallelize import Parallel
from tasks.process import Process
from tasks.progress import progress
from tasks.section import read_section
from tasks.shards import read_manifest, read_windows
from tasks.train import probe, start
from tasks.train.params import TrainParams, checkpoint_inputs
from tasks.training import train
from tasks.world import World


def main() -> None:
    params = read_section("train", TrainParams).on(int(os.environ["WORLD_SIZE"]))
    timeout = params.communication.timeout_seconds
    with (
        world.joined(params, params.mesh, timeout) as here,
        heartbeat.beating(here.rank, here.size, params.hang_timeout_seconds) as beat,
        progress("train", here.is_first) as shown,
    ):
        probe.report(here, "train")
        beat.move()
        # By itself: what sums gradients has to be gone before the group of processes is.
        train_and_write(params, Process("train", here, shown, beat))
        # On another machine, the stage has not ended before its files are there.
        here.lowest(0)


def train_and_write(params: TrainParams, process: Process) -> None:
    """Trains from where ``params`` say, with all processes; leaves ``models/float``, the curve and the report."""
    here, beat = process.world, process.beat
    manifest = read_manifest()
    origin = init.checkpoint()
    key = inputs.key("train", params, checkpoint_inputs())
    check_alike(here, key)
    checkpoints = Checkpoints("train", key, params.keep_checkpoints, params.elastic)
    checkpoints.moved = beat.move
    if here.is_first:
        checkpoints.forget_others()
        beat.move()
    model, weights = start.begun(origin, params, manifest)
    if origin is not None and not params.trains_mtp and (count := hugging_face.left_out(origin)):
        why = "lora does not train them" if params.lora else "mtp_loss_weight is 0"
        process.progress.notice(
            f"{count} tensors of multi-token prediction are left out: {why}, and {paths.FLOAT} has none"
        )
    unread: Weights | None = weights
    if here.mesh is None:
        # Every process holds the whole model.
        fill(model, beat.along(weights))
        unread = None
    total, active = on_meta(model.config).parameter_counts()
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    windows = read_windows(manifest, params.seq_len, beat.move)
    curve, parallel = train(model, params, windows, process, checkpoints, origin is not None, unread)
    beat.at(params.steps, "the model's writing")
    write_model(model, params, parallel, process, origin, manifest.answer_ends)
    if here.is_first:
        counts = {"parameters": total, "active_parameters": active, "trained_parameters": learning}
        write_reports(counts, curve, params, len(windows.train), here.precision, origin)


def check_alike(here: World, key: str) -> None:
    """Ends all where a machine has other inputs, by their ``key``: replicas only exchange gradients, and would part."""
    if others := here.unlike_first(key):
        here.fail(
            BadInput(
                f"train: {ranks(others)} and rank 0 do not have the same inputs: the section train of {paths.PARAMS}, "
                f"{paths.SHARDS}, {paths.INIT}, {paths.LOCK} and the code have to be the same on all machines. Have "
                "them share the project's folder, or copy it from one to the others."
            )
        )


def write_model(
    model: LanguageModel,
    params: TrainParams,
    parallel: Parallel,
    process: Process,
    origin: Path | None,
    answer_ends: Sequence[int],
) -> None:
    """Writes ``models/float`` from the weights that ``parallel`` has: the first process writes, all send theirs.

    ``answer_ends`` is as of :func:`lm.hugging_face.save_companions`.
    """

    def moving(name: str) -> torch.Tensor:
        process.beat.move()
        return parallel.whole(name)

    whole: Whole = moving
    with atomic.folder(paths.FLOAT) if process.world.is_first else contextlib.nullcontext() as folder:
        if params.lora is not None:
            if params.lora.keep_adapter:
                # A folder of the same layout; what a GGUF file or the version in production is, peft cannot load.
                is_folder = params.init != init.PREVIOUS and not params.init.endswith(".gguf")
                place = folder / paths.ADAPTER.name if folder else None
                low_rank.save(model, whole, place, params.init if is_folder else None)
            whole = low_rank.merged(model, whole)
        hugging_face.save_weights(model.config, whole, folder)
        if folder:
            hugging_face.save_companions(model.config, paths.TOKENIZER, folder, origin, answer_ends)


def write_reports(
    counts: dict[str, int], curve: Curve, params: TrainParams, windows: int, precision: str, origin: Path | None
) -> None:
    """Writes the curve and the report of the training, which started from the checkpoint in ``origin``."""
    atomic.write_text(paths.CURVE, curve.to_csv())
    tokens = params.steps * params.global_batch * params.seq_len
    report = {
        "parameters": counts["parameters"],
        "active_parameters": counts["active_parameters"],
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
        report["trained_parameters"] = counts["trained_parameters"]
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
