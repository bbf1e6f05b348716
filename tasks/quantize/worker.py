"""One quantizing process, as :mod:`tasks.launch` starts it. The first one exports the graph and audits it."""

import contextlib
import functools
import gc
import itertools
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lm import hugging_face, onnx_model
from lm.calibration import calibrate
from lm.compensation import compensate
from lm.distillation import teach
from lm.hugging_face_files import companions
from lm.model import LanguageModel
from lm.quantization import Plan, prepare
from lm.rotation import rotate, turn_hidden
from lm.weights import Weights, fill, reads, taken
from tasks import atomic, heartbeat, inputs, out_of_memory, paths, stage, world
from tasks.checkpoints import Checkpoints
from tasks.curve import Curve
from tasks.parallel.parallelize import Parallel
from tasks.process import Process
from tasks.progress import Progress, progress
from tasks.quantize import memory
from tasks.quantize.audit import audit
from tasks.quantize.params import QuantizeParams, SchemeName, checkpoint_inputs
from tasks.quantize.schemes import SCHEMES, Measure, Quantization, Trial, check_in_float, plan_name, plan_of
from tasks.section import read_section
from tasks.shards import WindowReader, Windows, read_manifest, read_windows
from tasks.step_log import sum_up
from tasks.training import train
from tasks.world import World

COPIED = ("config.json", "tokenizer.json")


def main() -> None:
    params = read_section("quantize", QuantizeParams)
    with (
        world.joined(params, params.mesh) as here,
        progress("quantize", here.is_first) as shown,
        output(here) as folder,
    ):
        model, plan, found, curve = quantize(params, here, shown, folder)
        if folder is not None:
            write(folder, model.cpu(), plan, found, curve)


def output(here: World) -> AbstractContextManager[Path | None]:
    """Returns what yields the folder that becomes ``models/int8``, in the first process, which alone writes to it."""
    return atomic.folder(paths.INT8) if here.is_first else contextlib.nullcontext()


class Attempt(NamedTuple):
    """What one scheme made of the float model. ``plain`` is its plan before anything was turned."""

    model: LanguageModel
    plan: Plan
    plain: Plan
    curve: Curve
    trials: tuple[Trial, ...]


def quantize(
    params: QuantizeParams, here: World, shown: Progress, folder: Path | None
) -> tuple[LanguageModel, Plan, Quantization, Curve]:
    """Returns the model and the plan of the first candidate that loses little enough, else of that which loses least.

    A scheme that fine-tunes is measured before that too: the difference is what the fine-tuning is worth. What it was
    then is left in ``folder``, None but in the first process. A fine-tuning that diverges ends the stage.
    """
    schemes = _Schemes(params, here, shown, folder)
    tried: dict[SchemeName, tuple[Trial, ...]] = {}
    for name in params.candidates:
        attempt = schemes.attempt(name)
        tried[name] = attempt.trials
        high = attempt.trials[-1].relative_loss.high
        if high is not None and high < params.max_relative_loss:
            break
        if name != params.candidates[-1]:
            # Two models might be too much for the memory.
            del attempt
            gc.collect()
    else:
        least = min(tried, key=lambda one: tried[one][-1].relative_loss.value)
        if least != name:
            # Once more, and the same.
            del attempt
            gc.collect()
            name, attempt = least, schemes.attempt(least)
    found = Quantization(
        asked=params.scheme,
        scheme=name,
        plan=plan_name(name, params, attempt.model.config),
        rotated=params.rotate,
        compensated=params.compensate,
        fine_tuned=SCHEMES[name].fine_tuned,
        objective=params.objective if SCHEMES[name].fine_tuned else None,
        in_float=params.in_float,
        routers=params.routers,
        norms=params.norms,
        ranges=dict(attempt.plain.ranges),
        windows=schemes.measure.count,
        trials=tuple(itertools.chain.from_iterable(tried.values())),
    )
    return attempt.model, attempt.plan, found, attempt.curve


class _Schemes:
    """Tries schemes on the float model in ``models/float``."""

    def __init__(self, params: QuantizeParams, here: World, shown: Progress, folder: Path | None) -> None:
        manifest = read_manifest()
        self._params, self._here, self._shown, self._folder = params, here, shown, folder
        self._checkpoints = Checkpoints(
            "quantize",
            inputs.key("quantize", params, checkpoint_inputs()),
            params.keep_checkpoints,
            params.elastic,
        )
        if here.is_first:
            self._checkpoints.forget_others()
        self._original = hugging_face.mapped(paths.FLOAT)
        check_in_float(self._original, params)
        length = self._original.config.window
        self._windows = read_windows(manifest, length)
        self.measure = Measure(self._original, self._windows.valid, params, here)
        out_of_memory.remember_allocations(here.device)
        count = min(params.calibration_windows, len(self._windows.train))
        held = functools.partial(memory.largest, self._original, length, count, params.compensate)
        # Of fine-tuning, train itself tells it.
        self._told = functools.partial(out_of_memory.told_of, "quantize", held)
        with self._told():
            self._seen = calibration_windows(self._windows.train, params, here)

    def attempt(self, name: SchemeName) -> Attempt:
        """Returns what the scheme ``name`` makes of the float model."""
        with self._told():
            return self._attempt(name)

    def _attempt(self, name: SchemeName) -> Attempt:
        params, here, seen = self._params, self._here, self._seen
        if self._folder is not None:
            # Of the scheme that was tried before.
            shutil.rmtree(self._folder / paths.POST_TRAINING.name, ignore_errors=True)
        plain = calibrate(self._original.to(here.device), plan_of(name, params, self._original.config), seen)
        model, plan = rounded(hugging_face.load(paths.FLOAT), plain, params, seen, self._shown)
        trials = [self.measure.trial(name, "post-training", model)]
        curve = Curve()
        if SCHEMES[name].fine_tuned:
            self._keep(model, plan)
            if params.objective == "float":
                teach(model, self._original)
            else:
                # Nobody asks it before the next trial, and a GPU's memory is what fine-tuning is short of.
                self._original.cpu()
            with heartbeat.beating(here.rank, here.size, params.hang_timeout_seconds) as beat:
                self._checkpoints.moved = beat.move
                process = Process("quantize", here, self._shown, beat)
                curve = fine_tuned(model, params, self._windows, process, self._checkpoints)
                # The first writes the end of a checkpoint alone; as long as it does, the others say that they live.
                here.lowest(0)
            model.taught = None
            trials.append(self.measure.trial(name, "fine-tuning", model))
        return Attempt(model, plan, plain, curve, tuple(trials))

    def _keep(self, model: LanguageModel, plan: Plan) -> None:
        """Writes the graph of ``model`` as fine-tuning begins with it, of which that leaves nothing."""
        if self._folder is not None:
            export(model.cpu(), plan, self._folder / paths.POST_TRAINING.name)
            model.to(self._here.device)
        # Once training has begun, whoever keeps the others waiting for long is taken for gone.
        self._here.lowest(0)


def fine_tuned(
    model: LanguageModel,
    params: QuantizeParams,
    windows: Windows,
    process: Process,
    checkpoints: Checkpoints,
) -> Curve:
    """Trains the rounded ``model`` in place, whole in every process before and behind that; returns the curve."""
    here, beat = process.world, process.beat
    weights = None if here.mesh is None else taken(model)
    run = train(model, params, windows, process, checkpoints, weights=weights)
    if here.mesh is not None:
        # Each process measures it on windows of its own.
        beat.at(params.steps, "the model's gathering")
        fill(model, beat.along(in_every_process(run.parallel, model, here)))
    curve = run.curve
    # What it was laid out in is in circles, and would lie beside the whole model until Python looks for them.
    del run
    gc.collect()
    return curve


def in_every_process(parallel: Parallel, model: LanguageModel, here: World) -> Weights:
    """Yields the weights and buffers of ``model``, which ``parallel`` has, one whole tensor at a time."""
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    shapes = {name: value.shape for name, value in model.state_dict().items() if name not in tied}
    for name, shape in shapes.items():
        value = parallel.whole(name)
        yield name, reads(here.from_first(value if here.is_first else torch.empty(shape)))


def calibration_windows(windows: WindowReader, params: QuantizeParams, here: World) -> torch.Tensor:
    """Returns token ids [n, T], spread evenly over ``windows``, the same in every process: no state has to be sent."""
    count = min(params.calibration_windows, len(windows))
    chosen = torch.from_numpy(windows.batch(np.arange(count) * len(windows) // count)).to(here.device)
    return chosen.long()[:, :-1]


def rounded(
    model: LanguageModel, plan: Plan, params: QuantizeParams, seen: torch.Tensor, shown: Progress
) -> tuple[LanguageModel, Plan]:
    """Prepares the float ``model`` in place, its spaces turned and its weights rounded as params say.

    Returns it, and ``plan`` with the ranges of the turned model where it has any. ``seen`` are calibration windows.
    """
    if params.rotate:
        plan = calibrate(turn_hidden(rotate(model), plan).to(seen.device), plan, seen)
    model.to(seen.device)
    if not params.compensate:
        return prepare(model, plan), plan
    shown.begin("rounding")
    return compensate(model, plan, seen, lambda done, blocks: shown.update(done, blocks, "blocks")), plan


def write(folder: Path, model: LanguageModel, plan: Plan, found: Quantization, curve: Curve) -> None:
    """Writes the graph with what a program needs beside it, its audit, what was tried, and the fine-tuning's curve."""
    export(model, plan, folder)
    report = audit(folder / paths.INT8_GRAPH.name, model, plan)
    for name in companions(paths.FLOAT):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((paths.FLOAT / name).read_bytes())
    (folder / "curve.csv").write_text(curve.to_csv())
    atomic.write_json(folder / paths.AUDIT.name, report.model_dump())
    atomic.write_json(folder / paths.QUANTIZATION.name, found.model_dump())
    if not curve.rows:
        sum_up("quantize", [], 1)


def export(model: LanguageModel, plan: Plan, folder: Path) -> None:
    """Writes the graph of ``model``, which lies on the CPU, with what scoring needs beside it."""
    folder.mkdir(exist_ok=True)
    onnx_model.export(model, plan, folder / paths.INT8_GRAPH.name)
    for name in COPIED:
        shutil.copyfile(paths.FLOAT / name, folder / name)


if __name__ == "__main__":
    stage.run_rank(main)
