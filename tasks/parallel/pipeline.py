"""Pipeline parallelism (GPipe, arXiv 1811.06965): each process has some of the layers, micro-batches go through them.

The order is one of torch.distributed.pipelining: 1F1B and its interleaved form (arXiv 2104.04473, section 2.2), or ZB-V
(arXiv 2401.10241, section 6), which computes the weights' gradients where a process would wait.

The model of a process keeps the names and modules of the whole, with None for each parameter that another one has, and
all routers' biases, which are small and move alike everywhere. Tied weights are two copies where embedding and head are
different stages', and so is the embedding where multi-token prediction reads it behind the last stage, which has a
module of its own for that (``embed_again``): the copies' gradients are summed, so that they stay equal.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from lm.model import LanguageModel
from lm.weights import Weights, fill
from tasks.order import Indices
from tasks.parallel import parts, whole
from tasks.parallel.gathered import Gathered
from tasks.parallel.parts import Kept, Saved
from tasks.parallel.sharded import release, shard_layer, sharded_modules, sum_gradients
from tasks.parallel.stages import EMBED_AGAIN, Stage, stages_of
from tasks.parallel.tensor import InParts, cut_regions
from tasks.parallel.vocabulary import cut_vocabulary
from tasks.world import World

Running = Schedule1F1B | ScheduleInterleaved1F1B | ScheduleZBVZeroBubble
_HEAD, _EMBEDDING, _AGAIN = "lm_head.weight", "model.embed_tokens.weight", f"{EMBED_AGAIN}.weight"


@contextlib.contextmanager
def cause_told() -> Iterator[None]:
    """Raises what went wrong in a stage: torch puts it behind an account of the stage's tensors."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


class Pipelined:
    """The layers of this process's stages, each laid over the other axes of the mesh."""

    def __init__(self, model: LanguageModel, world: World, weights: Weights) -> None:
        """``model`` is on ``meta``, with ``weights`` to read."""
        assert world.mesh is not None
        assert world.stages_group is not None
        self._world, self._group, self._layout = world, world.stages_group, world.mesh.layout
        self._here = self._group.rank()
        is_tied = model.lm_head.weight is model.model.embed_tokens.weight
        # What the last stage has of the embedding: copies of its weights, by their names there.
        self._copies = dict.fromkeys([_HEAD] * is_tied + [_AGAIN] * bool(len(model.mtp)), _EMBEDDING)
        layers = stages_of(model, self._layout.stages)
        self._stage_of_layer = {layer: stage for stage, some in enumerate(layers) for layer in some}
        self.model = self._part(model)
        release(model)
        self._stages = {
            stage: Stage(self.model, some, world) for stage, some in enumerate(layers) if self._is_here(stage)
        }
        self._in_parts: InParts | None = None
        if self._layout.data * self._layout.tensor > 1:
            self._shard()
        fill(self.model, weights, functools.partial(whole.filled, device=world.device), self._copies)
        self.scale = self._over = 1.0
        self.weight = 1 / self._layout.data
        self._passes = 0
        self._gathered = Gathered(self.model, world.writers)
        self._running: dict[tuple[int, ...], Running] = {}

    def grouped(self, samples: Indices) -> Indices:
        # All micro-batches of a step are on their way at once.
        self._passes = len(samples)
        return samples.reshape(1, -1)

    def loss(self, windows: torch.Tensor, over: float) -> torch.Tensor:
        running, self._over = self._schedule(windows), over
        ids, targets = _ids(windows), windows[..., 1:]
        losses: list[torch.Tensor] = []
        with torch.autocast(self._world.device.type, enabled=False), cause_told():
            running.step(
                *([ids] if 0 in self._stages else []),
                target=targets if self._last in self._stages else None,
                losses=losses,
                return_outputs=False,
            )
        if self._in_parts is not None:
            self._in_parts.sum_gradients()
        self._add_up_copies()
        found = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self._world.device)
        found /= self.scale
        dist.all_reduce(found, group=self._group)
        return found * self._layout.data

    def reduce_in_backward(self, reduce: bool) -> None:
        # The schedule knows which backward pass is the last of each stage.
        pass

    def backward(self, loss: torch.Tensor) -> None:
        pass

    def evaluate(self, windows: torch.Tensor) -> torch.Tensor:
        x, place = _ids(windows), self._layout.process_of
        for number, stage in self._stages.items():
            if number and place(number - 1) != self._here:
                x = self._hidden(windows, self._world.device, self._layout.tensor)
                dist.recv(x, group=self._group, group_src=place(number - 1))
            x = stage(x)
            if number < self._last and place(number + 1) != self._here:
                dist.send(x.contiguous(), group=self._group, group_dst=place(number + 1))
        if self._last not in self._stages:
            return torch.zeros((), device=self._world.device)
        return self._stages[self._last].loss(x, windows[..., 1:])

    def clip(self, max_norm: float) -> torch.Tensor:
        own = dict(self.model.named_parameters())
        elsewhere = [own[name] for name in self._copies if name in own]
        return whole.clip_grad_norm(self.model.parameters(), max_norm, self._group, elsewhere)

    def state(self, optimizer: torch.optim.Optimizer) -> Kept:
        self._cut()
        return parts.kept(self.model, optimizer, self._copies)

    def load_state(self, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
        self._cut()
        parts.load(self.model, optimizer, saved, self._copies)

    def whole(self, name: str) -> torch.Tensor:
        self._cut()
        return self._gathered.tensor(self._copies.get(name, name))

    @property
    def _last(self) -> int:
        return self._layout.stages - 1

    def _is_here(self, stage: int) -> bool:
        return self._layout.process_of(stage) == self._here

    def _stage_of(self, parameter: str) -> int:
        """Returns the stage that has the parameter of that name."""
        if parameter.startswith("model.layers."):
            return self._stage_of_layer[int(parameter.split(".")[2])]
        return 0 if parameter == _EMBEDDING else self._last

    def _part(self, model: LanguageModel) -> LanguageModel:
        # The modules twice, the weights once.
        known = {id(parameter): parameter for parameter in model.parameters()}
        part = copy.deepcopy(model, dict(known))
        if _AGAIN in self._copies:
            again = copy.deepcopy(model.model.embed_tokens, dict(known))
            part.add_module(EMBED_AGAIN, again)
            # Looked up when it is called: it may be laid out later.
            part.embedded_again = lambda ids: again(ids)  # type: ignore[method-assign]
        for path, module in part.named_modules():
            for name, value in list(module.named_parameters(recurse=False)):
                full = f"{path}.{name}"
                kept = None
                if self._is_here(self._stage_of(full)):
                    values = value.detach().clone() if full in self._copies else value.detach()
                    kept = nn.Parameter(self._on_device(values), requires_grad=value.requires_grad)
                module.register_parameter(name, kept)
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, self._on_device(buffer))
        return part

    def _on_device(self, value: torch.Tensor) -> torch.Tensor:
        return value if value.is_meta else value.to(self._world.device)

    def _shard(self) -> None:
        assert self._world.mesh is not None
        if self._layout.tensor > 1:
            tensor = self._world.mesh.dense["tensor"]
            self._in_parts = cut_regions(self.model, tensor)
            cut_vocabulary(self.model, tensor, self._layout.shard * self._layout.expert)
        for stage in self._stages.values():
            further = [one.block for one in stage.mtp] if stage.mtp is not None else []
            for layer in [*stage.layers, *further]:
                # A gather for each micro-batch and pass would cost more than the weights that lie there meanwhile.
                shard_layer(layer, self._world.mesh, gather_again=False)
            fully_shard(stage, mesh=self._world.mesh.dense["replicate", "dense"], reshard_after_forward=False)
            sum_gradients(stage)

    def _cut(self) -> None:
        # After a validation the weights are still whole.
        for stage in self._stages.values():
            for module in sharded_modules(stage):
                module.reshard()

    def _hidden(self, windows: torch.Tensor, device: torch.device | str, shares: int) -> torch.Tensor:
        """Returns room for the hidden states of ``windows``, of which a process has one of so many ``shares``."""
        tokens = (windows.shape[-1] - 1) // shares
        return torch.empty(len(windows), tokens, self.model.config.hidden_size, dtype=torch.float32, device=device)

    def _schedule(self, windows: torch.Tensor) -> Running:
        if tuple(windows.shape) not in self._running:
            micro = windows[: len(windows) // self._passes]
            between = self._hidden(micro, "meta", self._layout.tensor).requires_grad_()
            # The head sees all tokens.
            at_end = self._hidden(micro, "meta", 1).requires_grad_()
            stages = [
                PipelineStage(
                    stage,
                    number,
                    self._layout.stages,
                    self._world.device,
                    input_args=between if number else _ids(micro),
                    output_args=at_end if number == self._last else between,
                    group=self._group,
                    dw_builder=_in_one_pass if stage.embed_again is not None else None,
                )
                for number, stage in self._stages.items()
            ]
            self._running[tuple(windows.shape)] = self._order(stages)
        return self._running[tuple(windows.shape)]

    def _order(self, stages: list[PipelineStage]) -> Running:
        # Scaled here, as for the other meshes: gradients are summed over micro-batches and processes.
        shares = self._passes * self._layout.data
        of_last: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda x, targets: (  # noqa: E731
            self._stages[self._last].loss(x, targets) / (shares * self._over) * self.scale
        )
        if self._layout.schedule == "1f1b":
            return Schedule1F1B(stages[0], self._passes, of_last, scale_grads=False)
        kind = ScheduleInterleaved1F1B if self._layout.schedule == "interleaved-1f1b" else ScheduleZBVZeroBubble
        return kind(stages, self._passes, of_last, scale_grads=False)  # type: ignore[arg-type]

    @torch.no_grad()
    def _add_up_copies(self) -> None:
        """Gives all copies of the embedding's weights the sum of their gradients."""
        if not self._copies:
            return
        first, last = self._layout.process_of(0), self._layout.process_of(self._last)
        own = dict(self.model.named_parameters())
        found = [own[name].grad for name in [_EMBEDDING, *self._copies] if name in own]
        # Frozen weights have none, in any of the stages.
        gradients = [whole.local(gradient) for gradient in found if gradient is not None]
        if not gradients:
            return
        total, *others = gradients
        for other in others:
            total += other
        if first != last and self._here == first:
            arrived = torch.empty_like(total)
            dist.recv(arrived, group=self._group, group_src=last)
            total += arrived
            dist.send(total, group=self._group, group_dst=last)
        elif first != last:
            dist.send(total, group=self._group, group_dst=first)
            dist.recv(total, group=self._group, group_src=first)
        for other in others:
            other.copy_(total)


def _ids(windows: torch.Tensor) -> torch.Tensor:
    """Returns what the first stage reads [B, T] of ``windows`` [B, T + 1] or, where not all counts, [B, 2, T + 1]."""
    return (windows if windows.dim() == 2 else windows[:, 0])[:, :-1]


def _in_one_pass() -> Callable[[], None]:
    """Makes a stage compute its weights' gradients with those of its inputs, also in a zero-bubble pipeline.

    torch (2.13) computes them later group by group and lets go of the graph behind each: what multi-token prediction
    reads beside the stage's input is needed by several of them.
    """
    return lambda: None
