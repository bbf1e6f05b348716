"""A training, step by step: what a step does, what is noted of it at a validation, and the state behind it.

What a step does depends on the parameters, the shards and the step's number alone, so the state of a training is the
model, the optimizer, the number of steps done and the curve so far.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lm.model import LanguageModel
from lm.weights import Weights
from tasks import divergence
from tasks.balance import Balance
from tasks.checkpoints import Snapshot
from tasks.compiled import compile_layers
from tasks.curve import Curve
from tasks.errors import BadParameter
from tasks.loss_scale import LossScale
from tasks.optimizers import make_optimizer
from tasks.order import batch_of_rank
from tasks.parallel.parallelize import lay_out
from tasks.parallel.parts import Saved
from tasks.parallel.traffic import Traffic
from tasks.process import Process
from tasks.recomputation import recompute
from tasks.schedule import learning_rate_at
from tasks.shards import Windows, share_learned
from tasks.step_meter import StepMeter, StepReport
from tasks.stopping import Stop
from tasks.training_params import TrainingParams
from tasks.validation import validate


class Trainer:
    """What one process knows of a training, and does in it."""

    def __init__(
        self,
        process: Process,
        model: LanguageModel,
        params: TrainingParams,
        windows: Windows,
        weights: Weights | None,
    ) -> None:
        """Lays ``model`` out over the processes; ``weights`` are its own where it is on ``meta``."""
        self.process, self.params, self.windows = process, params, windows
        self.stage, self.progress = process.stage, process.progress
        self.world, self.beat = world, beat = process.world, process.beat
        self.curve = Curve()
        self.tokens_per_step = params.global_batch * windows.train.length
        messages = world.mesh is not None and world.mesh.layout.pipeline > 1
        self.traffic = Traffic(world.device, messages, world.writers)
        # Counts the parameters of the whole model.
        self.meter = StepMeter(model, self.tokens_per_step, world, params.compiles)
        self.parallel, self.exchange = lay_out(model, world, params, weights and beat.along(weights))
        self.model = self.parallel.model
        if params.compiles:
            compile_layers(self.model, world.device)
        recompute(self.model, params.activation_checkpointing)
        self.optimizer = make_optimizer(self.model, params)
        self.scale = LossScale(world.precision)
        # Since the last row of the curve: the sums of losses and of gradient norms.
        self.losses = torch.zeros(2, dtype=torch.float64, device=world.device)
        self.balance = Balance(self.model.routers(), params, world.device)
        self.steps_since_row: float = 0
        self.told_to_stop = False
        # What ends the training behind this step.
        self.fault: BadParameter | None = None
        # After how many steps the replicas were last equal, where they train apart.
        self.met = 0

    def step(self, step: int, stop: Stop) -> StepReport:
        """Takes one optimizer step; returns what it came to, its loss the mean over those that take it together.

        Sets ``told_to_stop``, on all of them alike, when one had been told to before the end of the step.
        """
        self.meter.begin()
        self.beat.at(step + 1, "the gradients")
        # What draws at random within a step depends on nothing before it, and no state has to be kept.
        drawn = np.random.SeedSequence([self.params.seed, step, self.world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.params, group["initial_lr"])
        total = self._add_up_gradients(step)
        norm = self.parallel.clip(self.params.clip_grad_norm)
        # What the processes have to agree on, summed over them; those along `tensor` have the same loss.
        spoilt = ~(norm.isfinite() & total.isfinite())
        self.beat.at(step + 1, "the agreement")
        with self.meter.communicating():
            near, told_here = self.exchange.near, total.new_tensor(float(stop.told))
            agreed = near.sum_all(torch.stack([total, told_here, spoilt.to(total)]))
        mean = agreed[0] / near.size
        told, spoilt_in = agreed[1:].tolist()
        if not self.exchange.apart:
            self.told_to_stop = told > 0
        load: list[float] = []
        if spoilt_in:
            self._skip(step, float(mean))
        else:
            self.scale.keep()
            self.optimizer.step()
            # Those along `tensor` have counted shares of the tokens. Where all counted the same ones (multi-token
            # prediction), the sum is a multiple, and only proportions matter.
            counts = self.balance.counted()
            if len(counts):
                with self.meter.communicating():
                    counts = near.sum_all(counts)
            load = self.balance.after_step(counts)
            self.losses += torch.stack([mean, norm]).double()
            self.steps_since_row += 1
        self.optimizer.zero_grad()
        if self.exchange.due(step + 1, self.params.steps):
            self.beat.at(step + 1, "the agreement")
            with self.meter.communicating():
                self._meet(step + 1, told > 0)
        rate = learning_rate_at(step, self.params, self.params.learning_rate)
        report = self.meter.end(step + 1, float(mean), float(norm), rate, load)
        return dataclasses.replace(report, skipped=bool(spoilt_in))

    def _add_up_gradients(self, step: int) -> torch.Tensor:
        """Computes the gradients of ``step``, pass by pass, reduced over the processes; returns the loss here."""
        with self.meter.waiting_for_data():
            samples = batch_of_rank(
                step, len(self.windows.train), self.params.seed, self.params.global_batch, self.params.micro_batch,
                self.world.data_rank, self.world.data_size,
            )  # fmt: skip
        samples = self.parallel.grouped(samples)
        self.parallel.scale = self.scale.value
        self.balance.press(self.scale.value * self.parallel.weight * self.world.data_size / self.tokens_per_step)
        total = torch.zeros((), device=self.world.device)
        passes = len(samples) * self._share_learned(step)
        for index, micro in enumerate(samples):
            # All passes but the last only add up gradients; the last one reduces them over the processes.
            self.parallel.reduce_in_backward(index == len(samples) - 1)
            with self.meter.waiting_for_data():
                windows = self.process.read(self.windows.train, micro)
            self.beat.batch()
            with self.world.autocast():
                loss = self.parallel.loss(windows, passes)
            self.beat.batch()
            self.parallel.backward(loss)
            total += loss.detach()
        self.scale.unscale(self.model.parameters())
        self.exchange.reduce(total)
        self.meter.reduced()
        return total

    def agree_to_stop(self, done: int, stop: Stop) -> None:
        """Sets ``told_to_stop`` where one of the replicas was told to, and each has taken ``done`` steps."""
        if stop.told and not self.beat.told:
            self.beat.tell()
        if self.beat.told and not self.told_to_stop:
            self.told_to_stop = self.beat.settled(done)

    def _meet(self, done: int, told: bool) -> None:
        """Makes the replicas equal after ``done`` steps: in their weights, and in what they know of these steps.

        ``told``: one of this replica was told to stop. All of a replica know that alike, and meet with others apart.
        """
        skipped = [float(step in self.curve.skipped) for step in range(self.met + 1, done + 1)]
        known = [self.losses, self.losses.new_tensor([self.steps_since_row, float(told), *skipped])]
        load = self.balance.load
        means = self.exchange.meet(torch.cat([*known, load.double().flatten()])).split(
            [2, 1, 1, len(skipped), load.numel()]
        )
        self.losses.copy_(means[0])
        self.steps_since_row, self.told_to_stop = means[1].item(), means[2].item() > 0
        load.copy_(means[4].view_as(load))
        known_here = {*self.curve.skipped}
        self.curve.skipped = [step for step in self.curve.skipped if step <= self.met]
        self.curve.skipped += [self.met + 1 + number for number, share in enumerate(means[3].tolist()) if share]
        self.met = done
        for step in sorted({*self.curve.skipped} - known_here):
            self.progress.notice(f"skipped {self._named(step)} in another replica: the gradient is not finite")
        if any(means[3].tolist()):
            self._end_if_too_many(self._named(self.curve.skipped[-1]))

    def _skip(self, step: int, loss: float) -> None:
        """Leaves all as it was before ``step``; in fp16 the factor of its ``loss`` may have been too large."""
        self.balance.skip_step()
        if math.isfinite(loss) and self.scale.halve():
            self.curve.overflows = self.scale.overflows
            return
        self.curve.skipped.append(step + 1)
        where = self._named(step + 1, f"loss {loss:.4g}, ")
        if not self.exchange.apart:
            self._end_if_too_many(where)
        if self.fault is None:
            self.progress.notice(f"skipped {where}: the gradient is not finite")

    def _named(self, step: int, more: str = "") -> str:
        """Returns ``step``, counted from 1, with ``more`` and the windows of all processes in words."""
        windows = map(str, sorted(self._batch(step - 1).flatten().tolist()))
        return f"step {step:,} ({more}windows {', '.join(windows)})"

    def _batch(self, step: int) -> npt.NDArray[np.int64]:
        """Returns the windows of all processes in ``step``, counted from 0."""
        params = self.params
        return batch_of_rank(step, len(self.windows.train), params.seed, params.global_batch, params.micro_batch, 0, 1)

    def _end_if_too_many(self, where: str) -> None:
        """Sets ``fault``, on all processes, when a step was skipped once too often, ``where``."""
        in_a_row = self.curve.skipped_in_a_row()
        # Nothing was learned when there was no other step.
        if in_a_row > self.params.max_skipped_steps or len(self.curve.skipped) == self.params.steps:
            self.fault = divergence.too_many_skipped(self.params, where, in_a_row)

    def measured_before(self, stop: Stop) -> bool:
        """Validates the weights that are there at the start; False where that was broken off."""
        self.beat.at(0, "the validation")
        if (loss := self.validate(stop)) is None:
            return False
        if not math.isfinite(loss):
            self.world.fail(divergence.starts_diverged(self.stage, self.world.precision, loss))
        self.curve.before = loss
        self.progress.notice(f"validation loss before the first step: {loss:.4f} nats a token")
        return True

    def recorded(self, step: int, stop: Stop) -> bool:
        """Validates and adds a row to the curve, where one is due after ``step`` steps and not there.

        False where that was broken off: another attempt has to do it.
        """
        due = step % self.params.validate_every == 0 or step == self.params.steps
        if not due or (self.curve.rows and self.curve.last("step") == step):
            return True
        self.beat.at(step, "the validation")
        if (loss := self.validate(stop)) is None:
            return False
        self._add_row(step, loss)
        if not math.isfinite(loss):
            self.world.fail(divergence.diverged(self.stage, self.params, self.world.precision, loss, step))
        return True

    def _add_row(self, step: int, valid_loss: float) -> None:
        rate = learning_rate_at(step - 1, self.params, self.params.learning_rate)
        if self.steps_since_row:
            train_loss, norm = (self.losses / self.steps_since_row).tolist()
            imbalance = self.balance.imbalance()
        else:
            # All were skipped.
            known = bool(self.curve.rows)
            train_loss, norm, imbalance = (
                self.curve.last(column) if known else math.nan
                for column in ("train_loss", "grad_norm", "expert_imbalance")
            )
        self.curve.rows.append((step, rate, train_loss, valid_loss, norm, imbalance))
        self.losses.zero_()
        self.balance.load.zero_()
        self.steps_since_row = 0

    def validate(self, stop: Stop) -> float | None:
        """Returns what :func:`tasks.validation.validate` does; None where one of the processes is told to end."""
        told = functools.partial(self._told_to_end, stop)
        return validate(self.parallel, self.windows.valid, self.params, self.process, told)

    def _told_to_end(self, stop: Stop) -> bool:
        """Sets ``told_to_stop``, on all processes alike, and returns it."""
        told = self.world.sum_all(torch.tensor(float(stop.told or self.told_to_stop), device=self.world.device))
        self.told_to_stop = bool(told)
        return self.told_to_stop

    def latest(self) -> dict[str, float]:
        return {"valid_loss": self.curve.last("valid_loss")} if self.curve.rows else {}

    def state(self, step: int) -> Snapshot:
        """Returns what this process brings to the checkpoint after ``step`` steps. Collective."""
        kept = self.parallel.state(self.optimizer)
        tensors = {f"{self.exchange.prefix}{name}": value for name, value in kept.tensors.items()}
        known = {
            "model": kept.model,
            "scale": self.scale.state(),
            "skipped": self.curve.skipped,
            "losses": self.losses,
            "load": self.balance.load,
            "steps_since_row": self.steps_since_row,
        }
        shared = {
            "step": step,
            "precision": self.world.precision,
            "optimizer": kept.optimizer,
            "met": self.met,
            "curve": self.curve.rows,
            "processes": self.curve.processes,
            "before": self.curve.before,
            "sent": self.traffic.so_far() if self.world.is_first else None,
        }
        # Replicas that train apart know it each for itself.
        shared, own = (shared, known) if self.exchange.apart else (shared | known, {})
        return Snapshot(shared, own, tensors | self.exchange.state())

    def restore(self, state: dict[str, Any] | None) -> int:
        """Takes over ``state``; returns how many steps are done."""
        if state is None:
            return 0
        if self.exchange.apart:
            state = state | state["own"][self.world.rank]
        folder = state["parts"].folder
        self.parallel.load_state(
            self.optimizer, Saved(folder, state["model"], state["optimizer"], self.exchange.prefix)
        )
        self.exchange.load_state(folder)
        if (was := state["precision"]) != self.world.precision:
            self.progress.notice(f"precision auto is {self.world.precision} here, and was {was}: a rebuild will differ")
        self.scale.load_state(state["scale"])
        self.curve.overflows = self.scale.overflows
        self.met = state["met"]
        self.curve.rows = [tuple(row) for row in state["curve"]]
        self.curve.skipped, self.curve.processes = list(state["skipped"]), list(state["processes"])
        self.curve.before = state["before"]
        self.traffic.go_on(state["sent"])
        self.losses.copy_(state["losses"])
        self.balance.load.copy_(state["load"])
        self.steps_since_row = state["steps_since_row"]
        return int(state["step"])

    def _share_learned(self, step: int) -> float:
        """Returns :func:`share_learned` of the windows of all processes: the loss is the mean over what is learned."""
        if self.windows.train.learned is None:
            return 1.0
        return share_learned(self.windows.train, self._batch(step).flatten())
