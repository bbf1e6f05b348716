"""Feed-forward layers: SwiGLU (arXiv 2002.05202), DeepSeek's mixture of experts (V3: arXiv 2412.19437, section 2.1.2;
V2: arXiv 2405.04434, section 2.2).

Shape suffixes: N tokens, D hidden size, F expert size, E experts, K experts a token, G groups of experts,
P rows of all experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lm.config import LatentConfig
from lm.linear import Linear, Project, stacked, to_product_type

ROWS = 64


class _Gate(torch.autograd.Function):
    # Autograd would put the gradient of the two halves together in one more copy.
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        gate_up, silu = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns ``silu(gate) * up`` [..., F] for ``gate_up`` [..., 2F], which holds gate first."""
    result: torch.Tensor = _Gate.apply(gate_up)
    return result


class _Deal(torch.autograd.Function):
    # Autograd would repeat each token K times, and add up as many gradients in a sum that is slow for few.
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, rows_NK: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(rows_NK)
        result = x_ND.new_zeros(rows, x_ND.shape[1])
        for rows_N in rows_NK.unbind(1):
            result.index_copy_(0, rows_N, x_ND)
        return result

    @staticmethod
    def backward(ctx: Any, grad_PD: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (rows_NK,) = ctx.saved_tensors
        grad_ND, *others = (grad_PD.index_select(0, rows_N) for rows_N in rows_NK.unbind(1))
        if len(others) > 1:
            # The sum of two is rounded once as it is.
            grad_ND = grad_ND.to(torch.promote_types(grad_ND.dtype, torch.float32))
        for other in others:
            grad_ND = grad_ND + other
        return grad_ND.to(grad_PD.dtype), None, None


class _Combine(torch.autograd.Function):
    # Autograd would hold [N, K, D] in fp32 three times, and add up gradients of rows that each occur once.
    @staticmethod
    def forward(ctx: Any, y_PD: torch.Tensor, rows_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        first, *others = zip(rows_NK.unbind(1), weights_NK.unsqueeze(-1).unbind(1), strict=True)
        parts = [y_PD.index_select(0, first[0])]
        result = parts[0] * first[1]
        for rows_N, weight_N1 in others:
            parts.append(y_PD.index_select(0, rows_N))
            result.addcmul_(parts[-1].to(result.dtype), weight_N1)
        ctx.save_for_backward(rows_NK, weights_NK, *parts)
        ctx.rows = len(y_PD)
        return result

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:  # type: ignore[override]
        rows_NK, weights_NK, *parts = ctx.saved_tensors
        grad_PD = parts[0].new_zeros(ctx.rows, parts[0].shape[1])
        for rows_N, weight_N1 in zip(rows_NK.unbind(1), weights_NK.unsqueeze(-1).unbind(1), strict=True):
            grad_PD.index_copy_(0, rows_N, (grad_ND * weight_N1).to(grad_PD.dtype))
        grad_weights_NK = torch.stack([(grad_ND * part).sum(dim=1) for part in parts], dim=1)
        return grad_PD, None, grad_weights_NK


def dealt(x_ND: torch.Tensor, rows_NK: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns [``rows``, D] with each token in its K rows ``rows_NK``, and zeros in the others."""
    result: torch.Tensor = _Deal.apply(x_ND, rows_NK, rows)
    return result


def combined(y_PD: torch.Tensor, rows_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Returns [N, D]: the sum over K of the rows ``rows_NK`` of ``y_PD``, weighted; no row may occur twice."""
    result: torch.Tensor = _Combine.apply(y_PD, rows_NK, weights_NK)
    return result


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(stacked(x, self.gate_proj, self.up_proj)))


class Router(nn.Module):
    """Chooses each token's experts by sigmoid scores, evened out by a bias that no gradient touches.

    Of DeepSeek-V2: by their softmax, without a bias.
    """

    e_score_correction_bias: torch.Tensor | None
    tokens_per_expert: torch.Tensor

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts) if config.has_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        # Whether tokens are counted in training; off while a layer is computed a second time.
        self.counts = True
        # Counted until `rebalance` uses them up.
        self.register_buffer("tokens_per_expert", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the chosen experts [N, K] and the weights [N, K] of their outputs. Always in fp32."""
        with torch.autocast(x_ND.device.type, enabled=False):
            products_NE = F.linear(x_ND.float(), self.weight.float())
        bias = self.e_score_correction_bias
        scores_NE = products_NE.softmax(dim=-1) if bias is None else products_NE.sigmoid()
        experts_NK = self.choose(scores_NE if bias is None else scores_NE + bias)
        # The bias decides who is chosen, never how much the chosen one counts.
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        if self.training and self.counts:
            with torch.no_grad():
                self.tokens_per_expert += torch.bincount(experts_NK.flatten(), minlength=scores_NE.shape[1])
        return experts_NK, weights_NK * self.config.routed_scaling_factor

    def choose(self, biased_NE: torch.Tensor) -> torch.Tensor:
        """Returns the K best experts of each token [N, K] within its ``topk_group`` best groups."""
        groups, kept = self.config.n_group, self.config.topk_group
        if kept < groups:
            biased_NGe = biased_NE.unflatten(1, (groups, -1))
            counted = 2 if self.config.has_bias else 1
            best_groups = biased_NGe.topk(counted, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
            masked = torch.ones_like(biased_NGe[..., 0], dtype=torch.bool).scatter(1, best_groups, False)
            # -inf, not 0: a bias may be negative, and a masked expert must lose against every other.
            biased_NE = biased_NGe.masked_fill(masked.unsqueeze(-1), float("-inf")).flatten(1)
        return biased_NE.topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def rebalance(self, rate: float) -> None:
        """Moves the bias by ``rate`` towards the experts with fewer tokens than the mean, and forgets the counts.

        Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1). With several processes the caller sums
        ``tokens_per_expert`` over them first. Without a bias it only forgets.
        """
        load = self.tokens_per_expert
        if self.e_score_correction_bias is not None:
            update = torch.sign(load.mean() - load)
            self.e_score_correction_bias += rate * (update - update.mean())
        load.zero_()


class Experts(nn.Module):
    """The routed experts, their weights stacked: ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F]."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.project_in: Project = F.linear
        self.project_out: Project = F.linear

    def forward(self, x_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Returns [N, D]: for each token the weighted sum of its experts' outputs.

        Tokens are laid out expert by expert, so that each expert is two plain matrix products. Each expert's rows are
        filled up with zeros to a multiple of ``ROWS``: oneDNN compiles a kernel for every new number of rows, and
        without this every step would bring some.
        """
        experts = len(self.gate_up_proj)
        chosen = experts_NK.flatten()
        counts = torch.bincount(chosen, minlength=experts)
        padded = (counts + ROWS - 1) // ROWS * ROWS
        # The row of each (token, expert) pair: where its expert's rows begin, and its place among them.
        order = chosen.argsort(stable=True)
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        rows = torch.empty_like(chosen)
        rows[order] = torch.arange(len(chosen), device=chosen.device) + shift[chosen[order]]

        rows_NK = rows.view_as(experts_NK)
        sizes: list[int] = padded.tolist()
        outputs = [
            self._expert(x, gate_up, down)
            for x, gate_up, down in zip(
                dealt(to_product_type(x_ND), rows_NK, sum(sizes)).split(sizes),
                self.gate_up_proj.unbind(),
                self.down_proj.unbind(),
                strict=True,
            )
        ]
        return combined(torch.cat(outputs), rows_NK, weights_NK)

    def _expert(self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return self.project_out(gated(self.project_in(x, gate_up)), down)


class MixtureOfExperts(nn.Module):
    """Routed experts, and shared ones that see every token."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_ND = x.flatten(0, -2)
        experts_NK, weights_NK = self.gate(x_ND)
        return self.experts(x_ND, experts_NK, weights_NK).view_as(x) + self.shared_experts(x)
