"""The training loop: data parallel, resumable at any step, equal after a resume to a run that was never disturbed.

What a step does depends on the parameters, the shards and the step's number alone, so the state of a run is the model,
the optimizer, the number of steps done and the curve so far.
"""

import math
import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lm.model import LanguageModel
from tasks import atomic, paths
from tasks.checkpoints import Checkpoints
from tasks.errors import BadParameter
from tasks.order import batch_of_rank
from tasks.parallel.parallelize import parallelize
from tasks.progress import Progress
from tasks.shards import WindowReader
from tasks.training_params import TrainingParams
from tasks.world import World

COLUMNS = ("step", "learning_rate", "train_loss", "valid_loss", "grad_norm", "expert_imbalance")


@dataclass
class Curve:
    """What is recorded at every validation: one row of ``COLUMNS`` each, losses in nats a token.

    ``expert_imbalance`` is the busiest expert's tokens over the mean expert's since the last row, averaged over layers;
    1 is perfect balance.
    """

    rows: list[tuple[float, ...]] = field(default_factory=list)

    def to_csv(self) -> str:
        lines = [",".join(COLUMNS), *(",".join(f"{value:.6g}" for value in row) for row in self.rows)]
        return "\n".join(lines) + "\n"

    def last(self, column: str) -> float:
        return self.rows[-1][COLUMNS.index(column)]


def learning_rate_at(step: int, params: TrainingParams) -> float:
    """Returns the rate of ``step`` (from 0): linear warm-up over ``warmup_fraction`` of the steps, then a cosine.

    The peak is reached at the warm-up's last step; the cosine ends at ``min_learning_rate_ratio`` of the peak.
    """
    warmup = math.ceil(params.warmup_fraction * params.steps)
    if step < warmup:
        return params.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, params.steps - 1 - warmup)
    floor = params.min_learning_rate_ratio
    return params.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def make_optimizer(model: nn.Module, params: TrainingParams) -> torch.optim.AdamW:
    """Returns AdamW that decays matrices and leaves norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": params.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    model: LanguageModel,
    params: TrainingParams,
    train_windows: WindowReader,
    valid_windows: WindowReader,
    checkpoints: Checkpoints,
    world: World,
    progress: Progress,
    stage: str,
) -> Curve:
    """Runs ``params.steps`` optimizer steps on ``model`` (in place, on every process) and returns the curve.

    Continues from the newest intact checkpoint. Raises :class:`BadParameter` when the loss stops being finite.
    """
    run = _Run(model, params, train_windows, valid_windows, world)
    done = run.restore(checkpoints.load_latest())
    progress.begin("training", done)
    started, first = time.monotonic(), done
    while done < params.steps:
        loss = run.step(done)
        done += 1
        if done % params.validate_every == 0 or done == params.steps:
            run.record(done)
        if done % params.checkpoint_every == 0 or done == params.steps:
            # Each process has a part in the state, even if one alone writes it.
            state = run.state(done)
            if world.is_first:
                checkpoints.save(done, state)
        progress.update(done, params.steps, "steps", loss=loss, **run.latest())
    run.parallel.finish()
    if world.is_first and done > first:
        _write_measurements(stage, run, time.monotonic() - started, (done - first) * run.tokens_per_step)
    return run.curve


class _Run:
    def __init__(
        self,
        model: LanguageModel,
        params: TrainingParams,
        train_windows: WindowReader,
        valid_windows: WindowReader,
        world: World,
    ) -> None:
        self.params, self.world = params, world
        self.train_windows, self.valid_windows = train_windows, valid_windows
        self.curve = Curve()
        self.parallel = parallelize(model, world)
        self.model = self.parallel.model
        self.optimizer = make_optimizer(self.model, params)
        self.passes = params.global_batch // (params.micro_batch * world.data_size)
        self.tokens_per_step = params.global_batch * train_windows.length
        self.seconds_for_data = 0.0
        # Since the last row of the curve: the sums of losses and of gradient norms, and the experts' tokens.
        self.losses = torch.zeros(2, dtype=torch.float64, device=world.device)
        experts = model.routers()[0].config.n_routed_experts if model.routers() else 0
        self.load = torch.zeros(len(model.routers()), experts, device=world.device)
        self.steps_since_row = 0

    def step(self, step: int) -> float:
        """Takes one optimizer step; returns its mean loss over all processes."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.params)
        samples = batch_of_rank(
            step, len(self.train_windows), self.params.seed, self.params.global_batch, self.params.micro_batch,
            self.world.data_rank, self.world.data_size,
        )  # fmt: skip
        total = torch.zeros((), device=self.world.device)
        for index, micro in enumerate(samples):
            # All passes but the last only add up gradients; the last one reduces them over the processes.
            self.parallel.reduce_in_backward(index == self.passes - 1)
            windows = self._read(self.train_windows, micro)
            with self.world.autocast():
                loss = self.parallel.loss(windows) / self.passes
            loss.backward()
            total += loss.detach()
        norm = self.parallel.clip(self.params.clip_grad_norm)
        if not math.isfinite(norm):
            raise BadParameter(
                f"params.yaml: the gradient is not finite at step {step + 1} (loss {total:.4g}). "
                f"Halve learning_rate (now {self.params.learning_rate:g}) or lengthen warmup_fraction."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._balance()
        mean = self.world.sum(total) / self.world.data_size
        self.losses += torch.stack([mean, norm]).double()
        self.steps_since_row += 1
        return float(mean)

    def _balance(self) -> None:
        routers = self.model.routers()
        if not routers:
            return
        counts = self.world.sum(torch.stack([router.tokens_per_expert for router in routers]))
        self.load += counts
        for router, summed in zip(routers, counts, strict=True):
            router.tokens_per_expert.copy_(summed)
            router.rebalance(self.params.bias_update_rate)

    def record(self, step: int) -> None:
        """Validates and adds a row to the curve."""
        train_loss, norm = (self.losses / self.steps_since_row).tolist()
        busiest = self.load.amax(dim=1) / self.load.mean(dim=1) if len(self.load) else torch.ones(1)
        rate = learning_rate_at(step - 1, self.params)
        self.curve.rows.append((step, rate, train_loss, self.validate(), norm, busiest.mean().item()))
        self.losses.zero_()
        self.load.zero_()
        self.steps_since_row = 0

    @torch.no_grad()
    def validate(self) -> float:
        """Returns the mean loss over validation windows spread evenly over the split."""
        available = len(self.valid_windows)
        wanted = min(self.params.validation_windows, available)
        chosen = torch.arange(wanted) * available // wanted
        mine = chosen[self.world.data_rank :: self.world.data_size].numpy()
        # Each process computes as often as the first one, which has most: the parts of a layer come from all of them.
        most = len(chosen[:: self.world.data_size])
        summed = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self.model.eval()
        for start in range(0, most, self.params.micro_batch):
            share = mine[start : start + self.params.micro_batch]
            windows = self._read(self.valid_windows, share if len(share) else chosen[:1].numpy())
            with self.world.autocast():
                summed += self.model.loss(windows).double() * len(share)
        self.model.train()
        return float(self.world.sum(summed) / wanted)

    def latest(self) -> dict[str, float]:
        return {"valid_loss": self.curve.last("valid_loss")} if self.curve.rows else {}

    def state(self, step: int) -> dict[str, Any]:
        model, optimizer = self.parallel.state(self.optimizer)
        return {
            "step": step,
            "model": model,
            "optimizer": optimizer,
            "curve": self.curve.rows,
            "losses": self.losses,
            "load": self.load,
            "steps_since_row": self.steps_since_row,
        }

    def restore(self, state: dict[str, Any] | None) -> int:
        """Takes over ``state``; returns how many steps are done."""
        if state is None:
            return 0
        self.parallel.load_state(self.optimizer, state["model"], state["optimizer"])
        self.curve.rows = [tuple(row) for row in state["curve"]]
        self.losses.copy_(state["losses"])
        self.load.copy_(state["load"])
        self.steps_since_row = state["steps_since_row"]
        return int(state["step"])

    def _read(self, windows: WindowReader, indices: Any) -> torch.Tensor:
        started = time.perf_counter()
        batch = torch.from_numpy(windows.batch(indices)).to(self.world.device).long()
        self.seconds_for_data += time.perf_counter() - started
        return batch


def _write_measurements(stage: str, run: _Run, seconds: float, tokens: int) -> None:
    measured = {
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 2),
        "share_of_time_waiting_for_data": round(run.seconds_for_data / seconds, 5),
        "peak_memory_of_a_process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "processes": run.world.size,
        "device": run.world.device.type,
    }
    atomic.write_json(paths.MEASUREMENTS / f"{stage}.json", measured)
