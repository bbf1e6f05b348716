"""A model whose gradients nothing sums while they are computed."""

from pathlib import Path

import torch
from torch import nn

from lm.model import LanguageModel
from lm.weights import tensor_of
from tasks.order import Indices
from tasks.parallel import parts, whole
from tasks.parallel.parts import Kept
from tasks.parallel.whole import State
from tasks.world import World


class Alone:
    """The whole model in every process, which computes its own gradients and sums nothing."""

    def __init__(self, model: LanguageModel, world: World, is_first: bool | None = None) -> None:
        """``is_first``: whether this is the first process of all, where ``world`` has only some of them."""
        self.model: LanguageModel = model.to(world.device)
        self._is_first = world.is_first if is_first is None else is_first
        self.scale = self.weight = 1.0

    def grouped(self, samples: Indices) -> Indices:
        return samples

    def loss(self, windows: torch.Tensor, over: float) -> torch.Tensor:
        return self.model.loss(windows) / over

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.scale).backward()

    def evaluate(self, windows: torch.Tensor) -> torch.Tensor:
        return self.model.loss(windows)

    def reduce_in_backward(self, reduce: bool) -> None:
        pass

    def clip(self, max_norm: float) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def state(self, optimizer: torch.optim.Optimizer) -> Kept:
        frozen = whole.frozen(self.model)
        state = {name: value for name, value in self.model.state_dict().items() if name not in frozen}
        return Kept(state, optimizer.state_dict())

    def load_state(self, optimizer: torch.optim.Optimizer, model_state: State, optimizer_state: State) -> None:
        self.model.load_state_dict(model_state, strict=not whole.frozen(self.model))
        whole.take_optimizer_state(optimizer, optimizer_state)

    def load_parts(self, optimizer: torch.optim.Optimizer, folder: Path, rest: tuple[State, State]) -> None:
        parts.load(self.model, optimizer, folder, rest)

    def whole(self, name: str) -> torch.Tensor:
        value = tensor_of(self.model, name).detach()
        return value.cpu() if self._is_first else value.to("meta")
