"""Cross-entropy that goes over the logits once, piece by piece in the cache, and keeps only its gradient."""

from typing import Any

import torch
import torch.nn.functional as F

# 1 MiB of fp32 at a time: what a core's second-level cache holds.
_LOGITS_AT_A_TIME = 2**18


class _CrossEntropy(torch.autograd.Function):
    # torch's own goes over [N, V] in fp32 five times and keeps three copies of it: at a vocabulary of 2,048 they are
    # larger than all else that a step keeps.
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        count, vocabulary = logits_NV.shape
        rows = max(1, _LOGITS_AT_A_TIME // vocabulary)
        gradient_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        for start in range(0, count, rows):
            targets = targets_N[start : start + rows].unsqueeze(1)
            piece = logits_NV[start : start + rows].to(torch.float32, copy=True)
            piece -= piece.amax(dim=1, keepdim=True)
            chosen = piece.gather(1, targets)
            sums = piece.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - chosen).sum()
            if gradient_NV is not None:
                scaled = piece.mul_(1 / (count * sums))
                scaled.scatter_add_(1, targets, scaled.new_full(targets.shape, -1 / count))
                gradient_NV[start : start + rows] = scaled
        if gradient_NV is not None:
            ctx.save_for_backward(gradient_NV)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * grad, None


def cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Returns the mean over N of -log softmax(logits)[target] in nats, summed in fp32 whatever the logits' type."""
    if logits_NV.device.type != "cpu":
        return F.cross_entropy(logits_NV.float(), targets_N)
    result: torch.Tensor = _CrossEntropy.apply(logits_NV, targets_N)
    return result
