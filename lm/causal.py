"""Causal attention itself: queries, keys and values [..., T, width] to outputs [..., T, width]."""

from typing import Any

import torch
import torch.nn.functional as F

# On CPUs two plain matrix products beat the flash kernel in bf16 while the scores still fit the cache: forward and
# backward of 16 x 4 heads of 256 x 64 take 35 ms against 60 ms on one core.
EXPLICIT_ATTENTION_UP_TO = 512
_ROWS = 128


class _Causal(torch.autograd.Function):
    # Rows before `_ROWS` see no keys after it, so a quarter of the products and of the softmax is left out for two
    # blocks of rows, three eighths for four. Through autograd the slices' gradients cost what that saves.
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        length, width = q.shape[1:]
        scaled = q * width**-0.5
        future = torch.full((_ROWS, _ROWS), float("-inf"), dtype=q.dtype).triu(1)
        shares, outputs = [], []
        for start in range(0, length, _ROWS):
            end = min(start + _ROWS, length)
            scores = torch.bmm(scaled[:, start:end], k[:, :end].transpose(1, 2))
            scores[:, :, start:] += future[: end - start, : end - start]
            # It computes in fp32 whatever it reads and writes.
            share = scores.softmax(dim=-1)
            shares.append(share)
            outputs.append(torch.bmm(share, v[:, :end]))
        ctx.save_for_backward(scaled, k, v, *shares)
        return torch.cat(outputs, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scaled, k, v, *shares = ctx.saved_tensors
        width = scaled.shape[2]
        grads_q: list[torch.Tensor] = []
        grad_k = grad_v = torch.empty(0)
        # From the last rows, which see all keys and begin the sums. Of two blocks a sum is rounded once in any type.
        exact = k.dtype if len(shares) <= 2 else torch.float32
        for share in reversed(shares):
            end = share.shape[2]
            rows, keys = slice(end - share.shape[1], end), slice(0, end)
            grad_share = torch.bmm(grad[:, rows], v[:, keys].transpose(1, 2))
            # Of softmax: y (g - sum(g y)).
            grad_scores = torch._softmax_backward_data(grad_share, share, -1, share.dtype)
            grads_q.append(torch.bmm(grad_scores, k[:, keys]))
            more_k = torch.bmm(grad_scores.transpose(1, 2), scaled[:, rows])
            more_v = torch.bmm(share.transpose(1, 2), grad[:, rows])
            if share is shares[-1]:
                grad_k, grad_v = more_k.to(exact), more_v.to(exact)
            else:
                grad_k[:, keys] += more_k
                grad_v[:, keys] += more_v
        grad_q = torch.cat(grads_q[::-1], dim=1).mul_(width**-0.5)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Returns [..., T, V]: for each query the mean of the values up to its own, weighted by softmax(q k / sqrt(W))."""
    length, width = q.shape[-2:]
    if q.device.type == "cpu" and length <= EXPLICIT_ATTENTION_UP_TO:
        heads = q.shape[:-2]
        out: torch.Tensor = _Causal.apply(q.flatten(0, -3), k.flatten(0, -3), v.flatten(0, -3))
        return out.unflatten(0, heads)
    # The flash kernels want values as wide as keys; zeros beyond the value's width change nothing.
    padding = width - v.shape[-1]
    if padding <= 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, F.pad(v, [0, padding]), is_causal=True)[..., :-padding]
