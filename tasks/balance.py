"""Evens out the experts' tokens in training: by each router's bias where its family has one, else by a loss."""

import torch

from lm.feed_forward import Router
from tasks.training_params import TrainingParams


class Balance:
    """The load of each layer's experts over a training, and what is done about it."""

    def __init__(self, routers: list[Router], params: TrainingParams, device: torch.device) -> None:
        self._routers, self._params = routers, params
        experts = routers[0].config.n_routed_experts if routers else 0
        self.load = torch.zeros(len(routers), experts, device=device)
        """The tokens of all processes since they were last set to zero [layers, experts]."""
        self._pressure = torch.zeros((), device=device)
        for router in routers:
            if params.balance_loss_weight and router.e_score_correction_bias is None and _is_trained(router):
                router.pressure = self._pressure

    def press(self, token: float) -> None:
        """Sets what a ``token`` of the coming step counts in the mean over all, times the scale of the gradients."""
        self._pressure.fill_(self._params.balance_loss_weight * token)

    def counted(self) -> torch.Tensor:
        """Returns the tokens of each expert [layers, experts] that this process has counted since the last step."""
        return torch.stack([router.tokens_per_expert for router in self._routers]) if self._routers else self.load

    def after_step(self, counts: torch.Tensor) -> list[float]:
        """Moves the routers' biases by the ``counts`` of all processes; returns each layer's busiest over the mean."""
        self.load += counts
        for router, summed in zip(self._routers, counts, strict=True):
            router.tokens_per_expert.copy_(summed)
            router.rebalance(self._params.bias_update_rate)
        return _busiest(counts).tolist() if self._routers else []

    def skip_step(self) -> None:
        """Forgets what was counted in a step that is not taken."""
        for router in self._routers:
            router.tokens_per_expert.zero_()

    def imbalance(self) -> float:
        """Returns the busiest expert's tokens over the mean's in :attr:`load`, a mean over the layers."""
        return float(_busiest(self.load).mean()) if self._routers else 1.0


def _busiest(counts: torch.Tensor) -> torch.Tensor:
    return counts.amax(dim=1) / counts.mean(dim=1)


def _is_trained(router: Router) -> bool:
    # Of a pipeline, other stages' routers have no weights here.
    return any(parameter.requires_grad for parameter in router.parameters())
