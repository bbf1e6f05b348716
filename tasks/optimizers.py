"""What turns gradients into steps: AdamW for everything, or Muon for matrices and AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest orthogonal one.
torch's takes whole matrices alone; :class:`StackedMuon` does the same for the experts' stacks and for what a mesh cuts.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim.optimizer import ParamsT

from lm.feed_forward import Experts, MixtureOfExperts, Router
from lm.linear import Embedding
from lm.model import LanguageModel
from tasks.parallel import whole
from tasks.training_params import TrainingParams

# Of the quintic iteration, as in torch.optim.Muon: the steepest slope at zero that still ends near one.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPSILON = 1e-7
# That of torch.optim.Muon where nothing else is said.
_MOMENTUM = 0.95


def make_optimizer(model: LanguageModel, params: TrainingParams) -> torch.optim.Optimizer:
    """Returns the optimizer that ``params`` name. Each group holds its peak rate as ``initial_lr``."""
    optimizer = _adamw(model.parameters(), params) if params.optimizer == "adamw" else _muon(model, params)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _adamw(parameters: Iterable[nn.Parameter], params: TrainingParams) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone, and frozen parameters out."""
    every = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in every if parameter.dim() > 1]
    vectors = [parameter for parameter in every if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": params.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=params.learning_rate, betas=(0.9, 0.95), fused=True)


def _muon(model: LanguageModel, params: TrainingParams) -> "Together":
    """Muon for the matrices between embedding and head; AdamW for those two, for routers, for gates of shared
    experts, norms and biases.

    The update of a matrix [A, B] is scaled by 0.2 sqrt(max(A, B)), which gives it the size of an AdamW update
    (arXiv 2502.16982, equation 4), so that one rate fits all shapes and the weight decay of AdamW fits too.
    """
    kept = {id(model.lm_head.weight)}
    for module in model.modules():
        if isinstance(module, Embedding | Router):
            kept.update(id(parameter) for parameter in module.parameters(recurse=False))
        elif isinstance(module, MixtureOfExperts) and module.shared_expert_gate is not None:
            kept.add(id(module.shared_expert_gate.weight))
    every = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = [parameter for parameter in every if parameter.dim() > 1 and id(parameter) not in kept]
    chosen = {id(parameter) for parameter in hidden}
    optimizers: list[torch.optim.Optimizer] = [
        _adamw((parameter for parameter in model.parameters() if id(parameter) not in chosen), params)
    ]
    rate, decay = params.muon_learning_rate, params.weight_decay
    matrices = [parameter for parameter in hidden if parameter.dim() == 2]
    # A pipeline's stage may have none of one kind: a group with nothing in it, so that all stages count alike.
    if matrices and not any(isinstance(parameter, DTensor) for parameter in matrices):
        optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    else:
        optimizers.append(StackedMuon([{"params": matrices}], lr=rate, weight_decay=decay))
    if any(isinstance(module, Experts) for module in model.modules()):
        stacks = {"params": [parameter for parameter in hidden if parameter.dim() == 3]}
        optimizers.append(StackedMuon([stacks], lr=rate, weight_decay=decay))
    return Together(optimizers)


class StackedMuon(torch.optim.Optimizer):
    """What ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` does, to a matrix or all of a stack [E, A, B].

    torch 2.13 refuses what is not a matrix; this goes when it takes stacks (pytorch#190597). Where a mesh cuts
    matrices, each process puts a momentum together from its parts, and takes its part of what is made of that.
    """

    def __init__(self, params: ParamsT, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": _MOMENTUM})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = whole.local(state["momentum_buffer"]).lerp_(whole.local(grad), 1 - group["momentum"])
        looked_ahead = whole.local(grad).lerp(momentum, group["momentum"])
        update = _of_whole_matrices(orthogonalized, looked_ahead, grad)
        own = whole.local(parameter)
        own.mul_(1 - group["lr"] * group["weight_decay"])
        own.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape[-2:]) ** 0.5)


def _of_whole_matrices(
    change: Callable[[torch.Tensor], torch.Tensor], part: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Returns this process's part of what ``change`` makes of matrices, cut as ``like``, of which it has ``part``."""
    if not isinstance(like, DTensor):
        return change(part)
    mesh, cut = like.device_mesh, like.placements
    # A stack that is cut between its matrices has them whole.
    kept = [place if like.dim() == 3 and place == Shard(0) else Replicate() for place in cut]

    def laid(values: torch.Tensor, places: Sequence[Placement]) -> DTensor:
        return DTensor.from_local(values, mesh, places, run_check=False, shape=like.shape, stride=like.stride())

    entered = laid(part, cut).redistribute(placements=kept).to_local()
    return laid(change(entered), kept).redistribute(placements=cut).to_local()


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Returns, in bf16, matrices [..., A, B] whose singular values Newton-Schulz iterations have moved to about one."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    upright = x.shape[-2] > x.shape[-1]
    if upright:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if upright else x).reshape(matrices.shape)


class Together(torch.optim.Optimizer):
    """Several optimizers as one, each with its own parameters: one list of groups, one state, one ``state_dict``."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        # The parts work on the very groups and state of the whole, so that whoever sets a rate here sets it there.
        first = 0
        for optimizer in self._optimizers:
            last = first + len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[first:last]
            optimizer.state = self.state
            first = last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # On another mesh another class may have had the matrices, with fewer settings of its own.
        groups = zip(self.state_dict()["param_groups"], state_dict["param_groups"], strict=True)
        super().load_state_dict({**state_dict, "param_groups": [{**own, **saved} for own, saved in groups]})
        self._share()

    def step(self) -> None:  # type: ignore[override]
        for optimizer in self._optimizers:
            optimizer.step()
