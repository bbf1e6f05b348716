"""The linear maps and the embedding of the model, with one seam for quantization-aware training.

``project(x, weight)`` and ``table(rows)`` are plain by default. :mod:`lm.fake_quant` puts its own functions there, so
that a layer is quantized by changing what it calls, not how it is written.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Project = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Linear(nn.Linear):
    """``x @ weight.T`` without bias: [..., in_features] to [..., out_features]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.project: Project = F.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x, self.weight)


def together(x: torch.Tensor, *layers: Linear) -> tuple[torch.Tensor, ...]:
    """Returns what each of ``layers`` makes of ``x``, computed as one product of their stacked weights."""
    y = layers[0].project(x, torch.cat([layer.weight for layer in layers]))
    return y.split([layer.out_features for layer in layers], dim=-1)


class Embedding(nn.Embedding):
    """The row of ``weight`` for each id: [...] to [..., embedding_dim]."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.table: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(ids)
        return rows if self.table is None else self.table(rows)
