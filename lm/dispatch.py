"""Which row each token takes on its way to its experts, there and back.

The rows of all experts are one matrix, sorted by expert, each expert's filled up to a multiple of ``ROWS``: oneDNN
compiles a kernel for every new number of rows, and a grouped product takes multiples of 8.

Shape suffixes: N tokens, D hidden size, E experts, K experts a token, P rows of all experts.
"""

from dataclasses import dataclass
from typing import Any

import torch

ROWS = 64


@dataclass(frozen=True)
class Rows:
    """Where the N x K pairs of a token and one of its experts lie among ``count`` rows: ``of_pair`` [N, K].

    ``ends`` [E] is where each expert's rows end. ``in_row`` [P] is the pair in each row, ``filled`` [P] whether there
    is one; None where rows are filled pair by pair.
    """

    count: int
    of_pair: torch.Tensor
    ends: torch.Tensor
    in_row: torch.Tensor | None = None
    filled: torch.Tensor | None = None


class _Deal(torch.autograd.Function):
    # Autograd would repeat each token K times, and add up as many gradients in a sum that is slow for few.
    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, rows_NK: torch.Tensor, rows: int, pair_P: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_NK)
        if pair_P is not None:
            # Of a row that is not filled any token will do: no gradient comes from there.
            return x_ND.index_select(0, pair_P // rows_NK.shape[1])
        result = x_ND.new_zeros(rows, x_ND.shape[1])
        for rows_N in rows_NK.unbind(1):
            result.index_copy_(0, rows_N, x_ND)
        return result

    @staticmethod
    def backward(ctx: Any, grad_PD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (rows_NK,) = ctx.saved_tensors
        grad_ND, *others = (grad_PD.index_select(0, rows_N) for rows_N in rows_NK.unbind(1))
        if len(others) > 1:
            # The sum of two is rounded once as it is.
            grad_ND = grad_ND.to(torch.promote_types(grad_ND.dtype, torch.float32))
        for other in others:
            grad_ND = grad_ND + other
        return grad_ND.to(grad_PD.dtype), None, None, None


class _Combine(torch.autograd.Function):
    # Autograd would hold [N, K, D] in fp32 three times, and add up gradients of rows that each occur once.
    @staticmethod
    def forward(
        ctx: Any,
        y_PD: torch.Tensor,
        weights_NK: torch.Tensor,
        rows_NK: torch.Tensor,
        pair_P: torch.Tensor | None,
        filled_P: torch.Tensor | None,
    ) -> torch.Tensor:
        first, *others = zip(rows_NK.unbind(1), weights_NK.unsqueeze(-1).unbind(1), strict=True)
        parts = [y_PD.index_select(0, first[0])]
        result = parts[0] * first[1]
        for rows_N, weight_N1 in others:
            parts.append(y_PD.index_select(0, rows_N))
            result.addcmul_(parts[-1].to(result.dtype), weight_N1)
        ctx.save_for_backward(weights_NK, rows_NK, pair_P, filled_P, *parts)
        ctx.rows = len(y_PD)
        return result

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weights_NK, rows_NK, pair_P, filled_P, *parts = ctx.saved_tensors
        if pair_P is not None:
            weight_P = weights_NK.flatten().index_select(0, pair_P) * filled_P
            grad_PD = (grad_ND.index_select(0, pair_P // rows_NK.shape[1]) * weight_P.unsqueeze(-1)).to(parts[0].dtype)
        else:
            grad_PD = parts[0].new_zeros(ctx.rows, parts[0].shape[1])
            for rows_N, weight_N1 in zip(rows_NK.unbind(1), weights_NK.unsqueeze(-1).unbind(1), strict=True):
                grad_PD.index_copy_(0, rows_N, (grad_ND * weight_N1).to(grad_PD.dtype))
        grad_weights_NK = torch.stack([(grad_ND * part).sum(dim=1) for part in parts], dim=1)
        return grad_PD, grad_weights_NK, None, None, None


def dealt(x_ND: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Returns [P, D] with each token in its K rows; the others hold zeros, or what is not to be looked at."""
    result: torch.Tensor = _Deal.apply(x_ND, rows.of_pair, rows.count, rows.in_row)
    return result


def combined(y_PD: torch.Tensor, weights_NK: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Returns [N, D]: the sum over K of each token's rows of ``y_PD``, weighted."""
    result: torch.Tensor = _Combine.apply(y_PD, weights_NK, rows.of_pair, rows.in_row, rows.filled)
    return result


def counted(experts_NK: torch.Tensor, experts: int) -> torch.Tensor:
    """Returns how many tokens come to each of so many experts [E]."""
    if experts_NK.device.type == "cpu":
        return torch.bincount(experts_NK.flatten(), minlength=experts)
    # A GPU's bincount has the host wait for it.
    return (experts_NK.unsqueeze(-1) == torch.arange(experts, device=experts_NK.device)).sum(dim=(0, 1))


def rows_by_pair(experts_NK: torch.Tensor, experts: int) -> Rows:
    """Lays out as many rows as there have to be, which the host waits for."""
    chosen = experts_NK.flatten()
    order = chosen.argsort(stable=True)
    counts = counted(experts_NK, experts)
    padded_ends = _padded(counts).cumsum(0)
    rows = torch.empty_like(chosen)
    rows[order] = torch.arange(len(chosen), device=chosen.device) + _shift(counts, padded_ends)[chosen[order]]
    return Rows(int(padded_ends[-1]), rows.view_as(experts_NK), padded_ends)


def rows_by_row(experts_NK: torch.Tensor, experts: int) -> Rows:
    """Lays out as many rows as there could be at most, and says what is in each of them.

    Nothing is known to the host and nothing is scattered: a GPU runs on, and gives the same bits each time. There has
    to be a token.
    """
    chosen = experts_NK.flatten()
    device, pairs = chosen.device, len(chosen)
    order = chosen.argsort(stable=True)
    counts = counted(experts_NK, experts)
    ends, padded_ends = counts.cumsum(0), _padded(counts).cumsum(0)
    shift = _shift(counts, padded_ends)
    of_pair = order.argsort() + shift[chosen]

    count = _padded(pairs) + experts * ROWS
    row = torch.arange(count, device=device)
    # Behind the last expert's rows nothing is filled, and nothing is computed.
    expert_P = torch.searchsorted(padded_ends, row, right=True).clamp(max=experts - 1)
    place_P = row - shift[expert_P]
    pair_P = order[place_P.clamp(max=pairs - 1)]
    return Rows(count, of_pair.view_as(experts_NK), padded_ends, pair_P, place_P < ends[expert_P])


def _padded(counts: Any) -> Any:
    return (counts + ROWS - 1) // ROWS * ROWS


def _shift(counts: torch.Tensor, padded_ends: torch.Tensor) -> torch.Tensor:
    # By how much each expert's rows lie behind where they would be without any padding.
    return (padded_ends - _padded(counts)) - (counts.cumsum(0) - counts)
