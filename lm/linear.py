"""The linear maps and the embedding of the model, with one seam for quantization-aware training.

``project(x, weight)`` and ``table(rows)`` are plain by default. :mod:`lm.quantization` puts its own functions there, so
that a layer is quantized by changing what it calls, not how it is written. ``turn`` is there for :mod:`lm.rotation`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Project = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Linear(nn.Linear):
    """``x @ weight.T``, plus the bias if there is one: [..., in_features] to [..., out_features].

    Where there is a ``turn`` [K, K], each K inputs are multiplied by it before anything else. ``bias_share`` is what
    the bias counts for: of outputs that several processes add up, one alone adds it.
    """

    turn: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if bias:
            nn.init.zeros_(self.bias)
        self.project: Project = F.linear
        self.bias_share = 1.0
        self.register_buffer("turn", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(turned(x, self.turn), self.weight)
        if self.bias is None:
            return y
        # In the product's type: a sum with fp32 would be fp32, and so would all that is made of it.
        bias = self.bias.to(y.dtype)
        return y + (bias if self.bias_share == 1 else bias * self.bias_share)


def turned(x: torch.Tensor, turn: torch.Tensor | None) -> torch.Tensor:
    """Returns ``x`` [..., n K] with each K numbers multiplied by ``turn`` [K, K]; as it is without one."""
    return x if turn is None else (x.unflatten(-1, (-1, len(turn))) @ turn).flatten(-2)


def stacked(x: torch.Tensor, *layers: Linear) -> torch.Tensor:
    """Returns what ``layers`` make of ``x``, one after the other in the last axis; one product if they are alike."""
    if any(layer.project != layers[0].project for layer in layers):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    y = layers[0].project(x, torch.cat([layer.weight for layer in layers]))
    return y if layers[0].bias is None else y + torch.cat([layer.bias for layer in layers]).to(y.dtype)


def together(x: torch.Tensor, *layers: Linear) -> tuple[torch.Tensor, ...]:
    """Returns what each of ``layers`` makes of ``x``; on a CPU computed as :func:`stacked` does."""
    if x.device.type != "cpu":
        # A GPU is as fast with each by itself, and neither weights nor gradients have to be put together.
        return tuple(layer(x) for layer in layers)
    return stacked(x, *layers).split([layer.out_features for layer in layers], dim=-1)


def to_product_type(x: torch.Tensor) -> torch.Tensor:
    """Returns ``x`` in the type in which autocast would multiply it; without autocast, as it is."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Embedding(nn.Embedding):
    """The row of ``weight`` for each id: [...] to [..., embedding_dim]."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.table: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(ids)
        return rows if self.table is None else self.table(rows)
