"""A model whose gradients nothing sums while they are computed."""

import dataclasses

import torch
from torch import nn

from lm.model import LanguageModel
from lm.weights import tensor_of
from tasks.order import Indices
from tasks.parallel import parts
from tasks.parallel.parts import Kept, Saved
from tasks.world import World


class Alone:
    """The whole model in every process, which computes its own gradients and sums nothing."""

    def __init__(self, model: LanguageModel, world: World, is_first: bool | None = None) -> None:
        """``is_first``: whether this is the first process of all, where ``world`` has only some of them."""
        self.model: LanguageModel = model.to(world.device)
        self._rank, self._size = world.rank, world.size
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
        kept = parts.kept(self.model, optimizer)
        return dataclasses.replace(kept, tensors=parts.share(kept.tensors, self._rank, self._size))

    def load_state(self, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
        parts.load(self.model, optimizer, saved)

    def whole(self, name: str) -> torch.Tensor:
        value = tensor_of(self.model, name).detach()
        return value.cpu() if self._is_first else value.to("meta")
