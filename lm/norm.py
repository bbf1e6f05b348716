"""Root mean square normalization (arXiv 1910.07467), in fp32 whatever the precision around it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _Normalize(torch.autograd.Function):
    # On CPUs torch composes F.rms_norm, and its gradient, of a dozen passes over memory; this takes half of them.
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.to(weight.dtype)
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        # With n = x / rms: dx = (g - n mean(g n)) / rms for g = grad * weight.
        normed, inverse, weight = ctx.saved_tensors
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(dim=0)
        mean = (product @ weight).unsqueeze(-1).div_(normed.shape[-1])
        return torch.addcmul(grad * weight, normed, mean, value=-1).mul_(inverse), grad_weight, None


class RMSNorm(nn.RMSNorm):
    """``x / rms(x) * weight`` over the last axis; [..., D] of any float type to [..., D] in the weight's type.

    Where there is a ``table``, ``weight`` is what that makes of it, as in :class:`lm.linear.Embedding`.
    """

    table: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.table is None else self.table(self.weight)
        if x.device.type != "cpu":
            return F.rms_norm(x.to(weight.dtype), self.normalized_shape, weight, self.eps)
        result: torch.Tensor = _Normalize.apply(x, weight, self.eps)
        return result
