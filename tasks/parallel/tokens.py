"""Hidden states [B, T, D] on their way between the processes of an axis that share a window's tokens, and back.

Each of these is differentiable; what it does going back is what Megatron-LM does (arXiv 2205.05198, section 4.2.2). A
whole that is computed alike in each process has a gradient that is whole in each; a part of a sum has one as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

Move = Callable[[torch.Tensor, dist.ProcessGroup], torch.Tensor]


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, there: Move, back: Move) -> torch.Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return ctx.back(grad, ctx.group), None, None, None


def gathered_for_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns all tokens, of which this process has its share ``x``, for what computes a part of a sum from them."""
    return _moved(x, group, _gathered, _dealt)


def dealt_from_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns this process's share of the tokens, summed over the parts ``x`` of all processes."""
    return _moved(x, group, _dealt, _gathered)


def whole_for_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns ``x``, the same in each process, for what computes a part of a sum from it."""
    return _moved(x, group, _same, _summed)


def whole_from_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the sum of the parts ``x`` of all processes."""
    return _moved(x, group, _summed, _same)


def share_of_whole(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns this process's share of the tokens ``x``, which are the same in each process."""
    return _moved(x, group, _share, _gathered)


def whole_of_shares(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns all tokens, of which this process has its share ``x``, for what each process computes alike."""
    return _moved(x, group, _gathered, _share)


def exchanged(x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the rows that come here, ``received`` from each process; of the rows ``x``, ``sent`` go to each."""
    there = functools.partial(_exchanged, sent, received)
    return _moved(x, group, there, functools.partial(_exchanged, received, sent))


def _moved(x: torch.Tensor, group: dist.ProcessGroup, there: Move, back: Move) -> torch.Tensor:
    result: torch.Tensor = _Moved.apply(x, group, there, back)
    return result


def _gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    shares = x.new_empty(group.size(), *x.shape)
    dist.all_gather_single(shares.flatten(0, 1), x.contiguous(), group=group)
    return shares.transpose(0, 1).flatten(1, 2)


def _dealt(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    shares = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    own = torch.empty_like(shares[0])
    dist.reduce_scatter_single(own, shares.flatten(0, 1), group=group)
    return own


def _summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def _share(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.unflatten(1, (group.size(), -1))[:, group.rank()].contiguous()


def _exchanged(sent: list[int], received: list[int], x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
    return result


def _same(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.view_as(x)
