"""Cross-entropy that on a CPU goes over the logits once, piece by piece in the cache, and keeps only its gradient.

Where even that is much (a vocabulary of 129,280 and 8 windows of 4,096 tokens: 17 GB in fp32) the head is taken into
the pieces too, and neither all logits nor their gradient are ever there at once.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lm.linear import to_product_type

Project = Callable[[torch.Tensor], torch.Tensor]
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# 1 MiB of fp32 at a time: what a core's second-level cache holds.
LOGITS_AT_A_TIME = 2**18
# 256 MiB of fp32. Below, the head is one product; above, several, whose gradients are added up.
LOGITS_HELD = 2**26
# Adding up the head's gradient costs a GPU, which multiplies much faster, as much as a thousand rows' product.
LOGITS_HELD_ON_GPU = 2**28


class _CrossEntropy(torch.autograd.Function):
    # torch's own goes over [N, V] in fp32 five times and keeps three copies of it: at a vocabulary of 2,048 they are
    # larger than all else that a step keeps.
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        count, vocabulary = logits_NV.shape
        rows = max(1, LOGITS_AT_A_TIME // vocabulary)
        gradient_NV = kept_gradient(logits_NV) if ctx.needs_input_grad[0] else None
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
            ctx.dtype = logits_NV.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (gradient_NV,) = ctx.saved_tensors
        # Of a step's only pass it is 1, and one way over all logits is spared.
        return (gradient_NV if grad == 1 else gradient_NV * grad).to(ctx.dtype), None


def kept_gradient(logits_NV: torch.Tensor) -> torch.Tensor:
    """Returns room for the gradient of ``logits_NV``: of fp16 in fp32, for no loss scale has touched it yet."""
    return torch.empty_like(logits_NV, dtype=torch.float32 if logits_NV.dtype == torch.float16 else None)


def cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Returns the mean over N of -log softmax(logits)[target] in nats, summed in fp32 whatever the logits' type."""
    if logits_NV.device.type != "cpu":
        return F.cross_entropy(logits_NV.float(), targets_N)
    result: torch.Tensor = _CrossEntropy.apply(logits_NV, targets_N)
    return result


class _ProjectedCrossEntropy(torch.autograd.Function):
    # Gradients are computed on the way forward, while a piece's logits are there; backward only scales them.
    @staticmethod
    def forward(
        ctx: Any, head: Project, measure: Measure, x_ND: torch.Tensor, targets_N: torch.Tensor, rows: int, *weights: Any
    ) -> Any:
        count = len(x_ND)
        wanted = [weight for weight in weights if weight.requires_grad]
        ctx.wanted = [weight.requires_grad for weight in weights]
        differentiates = ctx.needs_input_grad[2] or any(ctx.wanted)
        grad_x = torch.empty_like(x_ND)
        grads = [torch.zeros_like(weight) for weight in wanted]
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        # In fp16 the gradients of a mean would be lost on their way; those of a sum are about one.
        lift = count if to_product_type(x_ND).dtype == torch.float16 else 1
        lifted = torch.full_like(total, lift)
        for start in range(0, count, rows):
            x = x_ND[start : start + rows].detach().requires_grad_(differentiates)
            with torch.set_grad_enabled(differentiates):
                share = measure(head(x), targets_N[start : start + rows]) * (len(x) / count)
            total += share.detach()
            if differentiates:
                grad_x[start : start + rows], *found = torch.autograd.grad(share, [x, *wanted], lifted)
                for grad, more in zip(grads, found, strict=True):
                    grad += more
        if differentiates:
            ctx.save_for_backward(*(grad if lift == 1 else grad / lift for grad in (grad_x, *grads)))
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        grad_x, *grads = ctx.saved_tensors
        found = iter(grads)
        return None, None, grad_x * grad, None, None, *(next(found) * grad if wanted else None for wanted in ctx.wanted)


def logits_held(device: str) -> int:
    """Returns how many logits are held at most on a ``device`` of torch's name."""
    return LOGITS_HELD if device == "cpu" else LOGITS_HELD_ON_GPU


def projected_cross_entropy(
    head: Project,
    x_ND: torch.Tensor,
    targets_N: torch.Tensor,
    vocabulary: int,
    measure: Measure = cross_entropy,
    weights: Iterable[torch.Tensor] = (),
) -> torch.Tensor:
    """Returns :func:`cross_entropy` of ``head(x)`` [N, ``vocabulary``], of which :func:`logits_held` are there at once.

    ``measure`` takes its place. ``weights`` are what a ``head`` computes with that is no module.
    Hooks that want to see the head's whole input (per-sample gradients) see pieces of it above that size.
    """
    rows = max(1, logits_held(x_ND.device.type) // vocabulary)
    if len(x_ND) <= rows:
        return measure(head(x_ND), targets_N)
    pieces = -(-len(x_ND) // rows)
    # Of one size, where that takes no more than twice as many: a compiled measure is compiled for each size.
    pieces = next((more for more in range(pieces, 2 * pieces) if not len(x_ND) % more), pieces)
    rows = -(-len(x_ND) // pieces)
    if isinstance(head, nn.Module):
        weights = head.parameters()
    # Within the function autograd is off, also where a gradient is wanted.
    wanted = weights if torch.is_grad_enabled() else ()
    result: torch.Tensor = _ProjectedCrossEntropy.apply(head, measure, x_ND, targets_N, rows, *wanted)
    return result


def over_learned(
    loss_of: Measure, x_BTD: torch.Tensor, targets_BT: torch.Tensor, learned_BT: torch.Tensor | None
) -> torch.Tensor:
    """Returns ``loss_of`` hidden states and their targets [B, T, ...], the mean over all positions.

    With ``learned_BT`` only positions that it has at 1 count, and the others add 0 to the same mean.
    """
    if learned_BT is None:
        return loss_of(x_BTD, targets_BT)
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten(0, 1)
    kept = learned_BT.flatten().nonzero().flatten()
    # Where none counts the head takes part all the same: a process without its gradient would hold up the others.
    rows = kept if len(kept) else kept.new_zeros(1)
    return loss_of(x_ND[rows].unsqueeze(0), targets_N[rows].unsqueeze(0)) * (len(kept) / len(x_ND))
