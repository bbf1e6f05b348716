"""Feed-forward layers: SwiGLU (arXiv 2002.05202), mixtures of experts: DeepSeek's (V3: arXiv 2412.19437, section 2.1.2;
V2: arXiv 2405.04434, section 2.2), Qwen2's (arXiv 2407.10671, section 2.2.2) and Qwen3's (arXiv 2505.09388, section 2).

Shape suffixes: N tokens, D hidden size, F expert size, E experts, K experts a token, G groups of experts,
P rows of all experts, S sequences.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from lm.config import LatentConfig, MixtureConfig
from lm.dispatch import combined, counted, dealt, rows_by_pair, rows_by_row
from lm.linear import Linear, Project, stacked, to_product_type, together, turned

# Where torch has a kernel for the products of all experts: on GPUs from Hopper on (on others it takes one after the
# other, and waits for their sizes). On CPUs it is no faster.
GROUPED_ON = {"cuda"}


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
    if gate_up.device.type != "cpu" or torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        # Kernels of torch's own, or a compiler's, which cannot look into the other way.
        return F.silu(gate) * up
    result: torch.Tensor = _Gate.apply(gate_up)
    return result


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            gate, up = together(x, self.gate_proj, self.up_proj)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(gated(stacked(x, self.gate_proj, self.up_proj)))


class _Pressed(torch.autograd.Function):
    # The gradient of a loss of its own, whichever way that of the model's loss comes: through a block that is gathered,
    # computed a second time, or a stage of a pipeline.
    @staticmethod
    def forward(ctx: Any, weights_NK: torch.Tensor, scores_NE: torch.Tensor, pressure_SE: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pressure_SE)
        ctx.tokens = len(scores_NE) // len(pressure_SE)
        return weights_NK.view_as(weights_NK)

    @staticmethod
    def backward(ctx: Any, grad_NK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (pressure_SE,) = ctx.saved_tensors
        return grad_NK, pressure_SE.repeat_interleave(ctx.tokens, dim=0), None


class Router(nn.Module):
    """Chooses each token's experts by sigmoid scores, evened out by a bias that no gradient touches.

    Of DeepSeek-V2 and Qwen: by their softmax, without a bias. A loss evens those out where a training has set
    ``pressure``, what a token weighs in it: for each sequence the sum over experts of their share of its tokens, times
    their mean score, 1 where all are alike (DeepSeek-V2, arXiv 2405.04434, section 2.2.3).
    """

    e_score_correction_bias: torch.Tensor | None
    pressure: torch.Tensor | None
    tokens_per_expert: torch.Tensor

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts) if config.has_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("pressure", None, persistent=False)
        # Adds what other processes have counted of the same sequences.
        self.sum_counts: Callable[[torch.Tensor], torch.Tensor] = lambda counts_SE: counts_SE
        # Whether tokens are counted in training; off while a layer is computed a second time.
        self.counts = True
        self.project: Project = F.linear
        # Counted until `rebalance` uses them up.
        self.register_buffer("tokens_per_expert", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x_ND: torch.Tensor, sequences: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the chosen experts [N, K] and the weights [N, K] of their outputs. Always in fp32.

        The tokens are those of so many ``sequences`` of one length, one after the other.
        """
        with torch.autocast(x_ND.device.type, enabled=False):
            products_NE = self.project(x_ND.float(), self.weight.float())
        bias = self.e_score_correction_bias
        scores_NE = products_NE.softmax(dim=-1) if bias is None else products_NE.sigmoid()
        experts_NK = self.choose(scores_NE if bias is None else scores_NE + bias)
        # The bias decides who is chosen, never how much the chosen one counts.
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        if self.training and self.counts:
            with torch.no_grad():
                self.tokens_per_expert += counted(experts_NK, scores_NE.shape[1])
        if self.training and self.pressure is not None:
            weights_NK = _Pressed.apply(weights_NK, scores_NE, self._pressed(experts_NK, sequences, self.pressure))
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
    def _pressed(self, experts_NK: torch.Tensor, sequences: int, pressure: torch.Tensor) -> torch.Tensor:
        """Returns the balancing loss's gradient at each sequence's scores [S, E]."""
        experts = len(self.tokens_per_expert)
        counts_SE = self.sum_counts(torch.stack([counted(own, experts) for own in experts_NK.chunk(sequences)]).float())
        return counts_SE / counts_SE.mean(dim=1, keepdim=True) * pressure

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


class Beside(Protocol):
    """What is added to the products of all experts, for :mod:`lm.low_rank`."""

    def of_expert(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Returns what is added to the product of ``x`` [N, in] with the weight of ``expert``: [N, out]."""

    def of_all(self, x_P: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Returns what is added to the products of the rows ``x_P`` [P, in], of which each expert's reach to an end."""


class Experts(nn.Module):
    """The routed experts, their weights stacked: ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F].

    ``turn`` is that of what ``down_proj`` reads, as of :class:`lm.linear.Linear`. ``beside_in`` and ``beside_out`` are
    modules that do as :class:`Beside` says.
    """

    turn: torch.Tensor | None
    beside_in: Beside | None
    beside_out: Beside | None

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.project_in: Project = F.linear
        self.project_out: Project = F.linear
        self.beside_in = self.beside_out = None
        self.register_buffer("turn", None, persistent=False)

    def forward(self, x_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Returns [N, D]: for each token the weighted sum of its experts' outputs.

        Tokens are laid out expert by expert, so that each expert is two plain matrix products; where there are grouped
        ones, two do for all experts.
        """
        experts, x_ND = len(self.gate_up_proj), to_product_type(x_ND)
        if self._takes_groups(x_ND):
            rows = rows_by_row(experts_NK, experts)
            ends = rows.ends.int()
            gate_up_PF = _all_products(dealt(x_ND, rows), self.gate_up_proj, self.beside_in, ends)
            hidden_PF = turned(gated(gate_up_PF), self.turn)
            return combined(_all_products(hidden_PF, self.down_proj, self.beside_out, ends), weights_NK, rows)
        return self.one_by_one(x_ND, experts_NK, weights_NK)

    def one_by_one(self, x_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """Returns what ``forward`` does, of ``x_ND`` in the type that is multiplied; the host waits for the counts."""
        rows = rows_by_pair(experts_NK, len(self.gate_up_proj))
        sizes: list[int] = rows.ends.diff(prepend=rows.ends.new_zeros(1)).tolist()
        outputs = [
            self._expert(expert, *parts)
            for expert, parts in enumerate(
                zip(dealt(x_ND, rows).split(sizes), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
            )
        ]
        return combined(torch.cat(outputs), weights_NK, rows)

    def _expert(self, expert: int, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        both = self.project_in(x, gate_up)
        if self.beside_in is not None:
            both = both + self.beside_in.of_expert(x, expert)
        hidden = turned(gated(both), self.turn)
        y = self.project_out(hidden, down)
        return y if self.beside_out is None else y + self.beside_out.of_expert(hidden, expert)

    def _takes_groups(self, x_ND: torch.Tensor) -> bool:
        plain = self.project_in is F.linear and self.project_out is F.linear
        # Sizes of factors are those of products too.
        sizes = [size for weight in self.parameters() for size in weight.shape[1:]]
        aligned = not any(size % 8 for size in sizes)
        # Of experts that are dealt out, no token may have come to this process.
        return len(x_ND) > 0 and plain and aligned and x_ND.dtype == torch.bfloat16 and x_ND.device.type in GROUPED_ON


def _all_products(x: torch.Tensor, weights: torch.Tensor, beside: Beside | None, ends: torch.Tensor) -> torch.Tensor:
    y = F.grouped_mm(x, to_product_type(weights).mT, offs=ends)
    return y if beside is None else y + beside.of_all(x, ends)


class MixtureOfExperts(nn.Module):
    """Routed experts, and where a family has them, shared ones that see every token.

    DeepSeek's are ``shared_experts``. Qwen2's is ``shared_expert``; what it says is multiplied by the sigmoid of
    ``shared_expert_gate``, a number for each token.
    """

    shared_experts: SwiGLU | None
    shared_expert: SwiGLU | None
    shared_expert_gate: Linear | None

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = SwiGLU(config.hidden_size, config.shared_size) if config.shared_size else None
        self.shared_experts, self.shared_expert = (shared, None) if isinstance(config, LatentConfig) else (None, shared)
        self.shared_expert_gate = None if self.shared_expert is None else Linear(config.hidden_size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_ND = x.flatten(0, -2)
        experts_NK, weights_NK = self.gate(x_ND, x.shape[:-2].numel())
        y = self.experts(x_ND, experts_NK, weights_NK).view_as(x)
        if self.shared_experts is not None:
            return y + self.shared_experts(x)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            return y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return y
