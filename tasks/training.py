"""The training loop: on any mesh, resumable at any step, equal after a resume to a run that was never disturbed.

When it validates, writes a checkpoint, logs and ends; what a step does says :mod:`tasks.trainer`.
"""

import dataclasses
import functools
import math
import resource
import sys
import time
from typing import NamedTuple, NoReturn

from lm.model import LanguageModel
from lm.weights import Weights
from tasks import atomic, divergence, out_of_memory, paths, stopping
from tasks.checkpoints import Checkpoints, agreed
from tasks.curve import Curve
from tasks.errors import EXIT_STOPPED
from tasks.parallel.parallelize import Parallel
from tasks.parallel.traffic import of_all_reduce
from tasks.process import Process
from tasks.progress import Progress
from tasks.shards import Windows
from tasks.step_log import StepLog, logged, sum_up
from tasks.step_meter import StepReport
from tasks.trainer import Trainer
from tasks.training_params import TrainingParams
from tasks.world import World


class Trained(NamedTuple):
    """What a training leaves: its curve, and the model over all processes."""

    curve: Curve
    parallel: Parallel


def train(
    model: LanguageModel,
    params: TrainingParams,
    windows: Windows,
    process: Process,
    checkpoints: Checkpoints,
    measure_first: bool = False,
    weights: Weights | None = None,
) -> Trained:
    """Runs ``params.steps`` optimizer steps on ``model``; returns the curve and what has the weights now.

    ``measure_first`` has the weights validated that it begins with. ``weights`` are those of a model on ``meta``, which
    stays there.

    Continues from the newest intact checkpoint. A step whose loss or gradient is not finite is skipped; raises
    :class:`tasks.errors.BadParameter` after more than ``params.max_skipped_steps`` of them in a row, or where none was
    taken, or where the validation loss is not finite: of such a model nothing is written.
    """
    world, length = process.world, windows.train.length
    out_of_memory.remember_allocations(world.device)
    told = functools.partial(out_of_memory.told, process.stage, params=params, length=length, precision=world.precision)
    with told(model):
        trainer = Trainer(process, model, params, windows, weights)
    with told(trainer.model):
        _go_on(trainer, checkpoints, measure_first)
    return Trained(trainer.curve, trainer.parallel)


def _go_on(trainer: Trainer, checkpoints: Checkpoints, measure_first: bool) -> None:
    """Takes the steps of ``trainer`` that no checkpoint has."""
    stage, params, world, progress = trainer.stage, trainer.params, trainer.world, trainer.progress
    state = agreed(checkpoints, world)
    with checkpoints.confirmed(state):
        done = trainer.restore(state)
        # Nobody looks again at what another still reads.
        world.lowest(0)
    if done < params.steps and trainer.curve.processes[-1:] != [world.size]:
        trainer.curve.processes.append(world.size)
    progress.begin("training", done)
    if 0 < done < params.steps:
        progress.notice(f"goes on after step {done:,} of {params.steps:,}, whose checkpoint is there")
    elif done:
        progress.notice(f"all {params.steps:,} steps are done, and the checkpoint of the last is there")
    started, first = time.monotonic(), done
    log = StepLog(stage, done) if world.is_first else None
    with stopping.noted(params.stop_seconds) as stop, trainer.meter.seeing_waits():
        if measure_first and not done and not trainer.measured_before(stop):
            _stop(checkpoints, world, progress, done)
        # A validation may have been broken off, behind the checkpoint that this goes on from.
        if done and not trainer.recorded(done, stop):
            _stop(checkpoints, world, progress, done)
        while done < params.steps:
            report = trainer.step(done, stop)
            done += 1
            # Where they have just met, all have agreed already, and may be on the way to what they do together.
            if trainer.exchange.apart and trainer.met < done:
                trainer.agree_to_stop(done, stop)
            if log:
                sent = trainer.traffic.after_step(done == params.steps or trainer.told_to_stop)
                log.write(dataclasses.replace(report, bytes_sent=sent))
            if trainer.fault is not None:
                world.fail(trainer.fault)
            stopped = not trainer.recorded(done, stop) or (trainer.told_to_stop and done < params.steps)
            if done % params.checkpoint_every == 0 or done == params.steps or stopped:
                _save(trainer, checkpoints, done)
            progress.update(done, params.steps, "steps", loss=report.loss, **trainer.latest(), **_shown(report))
            if stopped:
                if world.is_first:
                    _write_measurements(trainer, time.monotonic() - started, (done - first) * trainer.tokens_per_step)
                _stop(checkpoints, world, progress, done)
    checkpoints.finish()
    if log:
        log.close()
        sum_up(stage, logged(stage), params.validate_every)
    if math.isnan(trainer.curve.last("train_loss")):
        world.fail(divergence.no_step(stage, params, world.precision, trainer.scale.overflows))
    if world.is_first and done > first:
        _write_measurements(trainer, time.monotonic() - started, (done - first) * trainer.tokens_per_step)
        if told := trainer.meter.waited_too_long():
            progress.notice(told)


def _save(trainer: Trainer, checkpoints: Checkpoints, done: int) -> None:
    """Begins the checkpoint after ``done`` steps, which is written while training goes on. Collective."""
    trainer.beat.at(done, "the checkpoint")
    checkpoints.save(done, trainer.state(done), trainer.world.writers)


def _stop(checkpoints: Checkpoints, world: World, progress: Progress, done: int) -> NoReturn:
    checkpoints.finish()
    # Nobody ends before the checkpoint is on the disk: the first one to end takes the others along.
    world.lowest(0)
    progress.notice(f"told to end (SIGTERM): stopped after step {done:,}, where another attempt goes on")
    sys.exit(EXIT_STOPPED)


def _shown(report: StepReport) -> dict[str, float]:
    return {
        "grad_norm": report.grad_norm,
        "tokens_per_second": report.tokens_per_second,
        "mfu": report.mfu,
        "waiting_for_data": report.seconds_for_data / report.seconds,
    }


def _share_of_whole_gradients(trainer: Trainer, sent: int | None) -> float | None:
    """Returns ``sent`` over what all-reduces of the gradients alone would have sent; None where a mesh cuts these."""
    world = trainer.world
    if sent is None or world.mesh is not None or world.size == 1:
        return None
    gradients = sum(4 * value.numel() for value in trainer.model.parameters() if value.requires_grad)
    return round(sent / (trainer.params.steps * of_all_reduce(gradients, world.size)), 4)


def _write_measurements(trainer: Trainer, seconds: float, tokens: int) -> None:
    measured = {
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 2),
        **trainer.meter.totals(),
        "peak_memory_of_a_process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "processes": trainer.world.size,
        "device": trainer.world.device.type,
        "bytes_sent": (sent := trainer.traffic.so_far()),
        "share_of_whole_gradients": _share_of_whole_gradients(trainer, sent),
    }
    atomic.write_json(paths.MEASUREMENTS / f"{trainer.stage}.json", measured)
