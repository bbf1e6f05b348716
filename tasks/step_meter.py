"""Where the time of a training step goes, and what it came to.

Waiting for data is the host's time. Communication is what the computing waited for: from the moment when this process
had its last gradient until DistributedDataParallel had reduced the last bucket, and the sums of losses and counts. What
is sent while gradients are still computed costs nothing and is not counted; waiting for a slower process is. On a GPU
both moments are events in the stream that computes. Where a mesh cuts the model, the layers wait too, and every wait of
this process is counted (:mod:`tasks.parallel.waits`). Where some of them cannot be seen (on a GPU, FSDP2's are between
streams; in compiled layers that `tensor` cuts, they are compiled) there is no number, and not one that is too small.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch
from torch import nn

from lm.config import GroupedConfig
from lm.feed_forward import Experts
from lm.model import LanguageModel
from tasks import paths
from tasks.parallel import waits
from tasks.peak import peak
from tasks.world import World

_USUAL_WAITING = 0.01
# The first step opens the files; in a training of seconds that alone is more than a hundredth.
_SECONDS_WORTH_A_WORD = 1.0


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step: times in seconds, loss in nats a token, the learning rate AdamW's (Muon's keeps its proportion to it).

    ``mfu`` counts 6 operations for each parameter that works on a token, 4 for a frozen one (attention's own products
    are left out), against the peak of all processes. ``memory_mib`` is of the first process: allocated on its GPU at
    most, else resident. ``expert_load`` is the busiest expert's tokens over the mean's, for each layer that routes.
    ``bytes_sent`` are those of the first process in the whole run, as they were last counted
    (:mod:`tasks.parallel.traffic`); ``seconds_for_communication`` is None where not all of it can be seen. A step that
    was ``skipped`` changed nothing: its gradient was not finite.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    mfu: float
    seconds: float
    seconds_for_data: float
    seconds_for_communication: float | None
    memory_mib: float
    expert_load: tuple[float, ...]
    bytes_sent: int | None = None
    skipped: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON knows no NaN: what is not finite becomes null."""
        written = dataclasses.asdict(self)
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in written.items()
        }


Mark = float | torch.cuda.Event


class StepMeter:
    """Measures the steps of one process; ``compiled`` says whether its layers are."""

    def __init__(self, model: LanguageModel, tokens_per_step: int, world: World, compiled: bool = False) -> None:
        self._world, self._tokens = world, tokens_per_step
        self._operations = 4 * active_in_products(model) + 2 * _trained_in_products(model)
        self.peak, self.peak_source = peak(world)
        self._last_gradient: Mark | None = None
        self._waits: list[tuple[Mark, Mark]] = []
        self._waiting = False
        self._sees_all = world.mesh is None or (
            world.device.type == "cpu" and not (compiled and world.mesh.layout.tensor > 1)
        )
        self._started = 0.0
        self._for_data = 0.0
        self._process = psutil.Process()
        # Over all steps: all seconds, those for data, those for communication.
        self.seconds, self.seconds_for_data, self.seconds_for_communication = 0.0, 0.0, 0.0
        self.steps = 0
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(self._got_gradient)

    def begin(self) -> None:
        """A step begins."""
        self._started, self._for_data = time.perf_counter(), 0.0
        self._last_gradient = None
        self._waits.clear()
        if self._world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._world.device)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._for_data += time.perf_counter() - started

    @contextlib.contextmanager
    def seeing_waits(self) -> Iterator[None]:
        """In this ``with`` block steps are taken, of which the model may have to wait for the other processes."""
        # Where the number would not be told, nothing is touched: torch's compiler would stop there.
        if self._world.mesh is None or not self._sees_all:
            yield
        else:
            with waits.within(self.communicating):
                yield

    @contextlib.contextmanager
    def communicating(self) -> Iterator[None]:
        """What happens in the ``with`` block is communication; in one block within another it counts once."""
        if self._waiting:
            yield
            return
        self._waiting, started = True, self._mark()
        try:
            yield
        finally:
            self._waiting = False
            self._waits.append((started, self._mark()))

    def reduced(self) -> None:
        """The gradients have just been reduced over all processes."""
        # Where a mesh cuts the model, that has been waited for, and seen.
        if self._last_gradient is not None and self._world.mesh is None:
            self._waits.append((self._last_gradient, self._mark()))

    def end(self, step: int, loss: float, grad_norm: float, rate: float, load: list[float]) -> StepReport:
        """The ``step`` (from 1) has ended, and the device has done all of it."""
        seconds = time.perf_counter() - self._started
        communicating = sum(_between(first, last) for first, last in self._waits)
        self.seconds += seconds
        self.seconds_for_data += self._for_data
        self.seconds_for_communication += communicating
        self.steps += 1
        return StepReport(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            tokens_per_second=round(self._tokens / seconds, 1),
            mfu=round(self._utilization(1, seconds), 5),
            seconds=round(seconds, 5),
            seconds_for_data=round(self._for_data, 6),
            seconds_for_communication=round(communicating, 6) if self._sees_all else None,
            memory_mib=round(self._memory() / 2**20, 1),
            expert_load=tuple(round(value, 4) for value in load),
        )

    def totals(self) -> dict[str, float | str | None]:
        """What all steps came to, for the report on speed."""
        communicating = round(self.seconds_for_communication / self.seconds, 5)
        return {
            "share_of_time_waiting_for_data": round(self.seconds_for_data / self.seconds, 5),
            "share_of_time_communicating": communicating if self._sees_all else None,
            "mfu": round(self._utilization(self.steps, self.seconds), 5),
            "peak_tflops": round(self.peak / 1e12, 3),
            "peak_is": self.peak_source,
        }

    def waited_too_long(self) -> str | None:
        """Returns what to tell the user where data held up the steps: over a hundredth of their time, and seconds."""
        share = self.seconds_for_data / self.seconds
        if share <= _USUAL_WAITING or self.seconds_for_data < _SECONDS_WORTH_A_WORD:
            return None
        return (
            f"{share:.1%} of the steps' time went into waiting for data (under {_USUAL_WAITING:.0%} is usual). "
            f"Put {paths.SHARDS} on a faster disk, or give the machine the memory to keep it."
        )

    def _utilization(self, steps: int, seconds: float) -> float:
        return self._operations * self._tokens * steps / seconds / self.peak

    def _memory(self) -> int:
        if self._world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._world.device)
        return int(self._process.memory_info().rss)

    def _got_gradient(self, parameter: torch.Tensor) -> None:
        self._last_gradient = self._mark()

    def _mark(self) -> Mark:
        if self._world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(first: Mark, last: Mark) -> float:
    if isinstance(first, float) and isinstance(last, float):
        return last - first
    assert isinstance(first, torch.cuda.Event)
    assert isinstance(last, torch.cuda.Event)
    return first.elapsed_time(last) / 1000


def active_in_products(model: LanguageModel) -> int:
    """Returns how many parameters multiply each token: the active ones, but for an embedding that is only looked up."""
    _, active = model.parameter_counts()
    # Turned before it is rounded, a model has a head of its own, whatever its configuration says.
    looked_up = model.lm_head.weight is not model.model.embed_tokens.weight
    active += model.active_in_mtp()
    return active - (model.model.embed_tokens.weight.numel() if looked_up else 0)


def _trained_in_products(model: LanguageModel) -> int:
    if all(parameter.requires_grad for parameter in model.parameters()):
        return active_in_products(model)
    # Where some are frozen, what is not is a layer's own factors, or an expert's.
    trained = _trained([model])
    if not isinstance(model.config, GroupedConfig):
        routed = _trained(module for module in model.modules() if isinstance(module, Experts))
        trained -= routed - round(routed * model.config.num_experts_per_tok / model.config.n_routed_experts)
    return trained


def _trained(modules: Iterable[nn.Module]) -> int:
    every = (parameter for module in modules for parameter in module.parameters())
    return sum(parameter.numel() for parameter in every if parameter.requires_grad)
