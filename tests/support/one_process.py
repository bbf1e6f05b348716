"""What :mod:`meshes` is compared with: plain loops over whole batches in one process, which share no parallel code."""

import copy
from typing import Any

import numpy as np
import torch
from meshes import BATCH, LENGTH, WINDOWS, Case, Reader, Result, model_of, params_of
from torch import nn

from lm.model import LanguageModel
from tasks.optimizers import make_optimizer
from tasks.order import batch_of_rank
from tasks.schedule import learning_rate_at


def alone(model_name: str, steps: int, optimizer_name: str = "adamw", answers: bool = False) -> Result:
    """Trains in this process: each step is one pass over the whole batch."""
    case = Case({}, model_name, steps=steps, optimizer=optimizer_name)
    result, params, model = Result(), params_of(case, 1), model_of(case)
    optimizer = make_optimizer(model, params)
    reader, held_out = Reader(1, WINDOWS, answers), Reader(2, 7, answers)
    balancing = BalancingLoss(model, params.balance_loss_weight)
    for step in range(case.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, params, group["initial_lr"])
        samples = batch_of_rank(step, WINDOWS, params.seed, BATCH, BATCH, 0, 1)[0]
        result.samples.append(sorted(samples.tolist()))
        mean = mean_loss(model, reader, samples, samples)
        (mean + balancing.of_step()).backward()
        result.losses.append(mean.item())
        if not step:
            result.gradients = {
                name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
            }
        result.norms.append(nn.utils.clip_grad_norm_(model.parameters(), params.clip_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        for router in model.routers():
            router.rebalance(params.bias_update_rate)
    model.eval()
    with torch.no_grad():
        measured = torch.arange(5) * 7 // 5
        result.valid_loss = mean_loss(model, held_out, measured, measured).item()
    result.weights = {name: value.clone() for name, value in model.state_dict().items()}
    result.elements = sum(value.numel() for value in model.parameters())
    return result


def mean_loss(model: LanguageModel, windows: Reader, indices: Any, batch: Any) -> torch.Tensor:
    """Returns the loss of the windows ``indices``, over what is learned in all of the ``batch`` that they belong to."""
    tokens = torch.from_numpy(windows.batch(indices))
    if windows.learned is None:
        return model.loss(tokens)
    learned, of_batch = (torch.from_numpy(windows.learned.batch(some)) for some in (indices, batch))
    return model.loss(torch.stack([tokens, learned], dim=1)) / of_batch[:, 1:].double().mean().float()


class BalancingLoss:
    """The loss of routers without a bias, written out: what share of a sequence each expert has, by its mean score."""

    def __init__(self, model: LanguageModel, weight: float) -> None:
        self._weight = weight
        self._found: list[torch.Tensor] = []
        for router in model.routers():
            # One that is frozen routes as it did in the training before.
            if router.e_score_correction_bias is None and router.get_parameter("weight").requires_grad:
                router.register_forward_hook(self._routed)

    def _routed(self, router: nn.Module, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
        scores = torch.softmax(inputs[0].float() @ router.get_parameter("weight").T, dim=-1)
        chosen = torch.zeros_like(scores).scatter(1, outputs[0], 1.0)
        # Equal shares give 1.
        shares = chosen.unflatten(0, (-1, LENGTH)).mean(dim=1) * scores.shape[1] / outputs[0].shape[1]
        self._found.append((shares * scores.unflatten(0, (-1, LENGTH)).mean(dim=1)).sum(dim=1).mean())

    def of_step(self) -> torch.Tensor:
        """Returns the loss of the forward pass that has just been."""
        total = self._weight * sum(self._found, torch.zeros(()))
        self._found.clear()
        return total


def apart(case: Case, processes: list[list[int]]) -> Result:
    """Trains replicas of those ``processes`` in this one, DiLoCo's equations written out (arXiv 2311.08105)."""
    size = sum(map(len, processes))
    params, reader, model = params_of(case, size), Reader(1, WINDOWS, case.answers), model_of(case)
    start = [value.detach().clone() for value in model.parameters()]
    momentum = [torch.zeros_like(value) for value in start]
    optimizers = [make_optimizer(model, params).state_dict() for _ in processes]
    biases = [router.e_score_correction_bias.clone() for router in model.routers()]
    for first in range(0, case.steps, case.inner_steps):
        moved, turned = [], []
        for number, ranks in enumerate(processes):
            optimizer = make_optimizer(model, params)
            optimizer.load_state_dict(optimizers[number])
            _set(model, start, biases)
            for step in range(first, first + case.inner_steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, params, group["initial_lr"])
                dealt = [
                    batch_of_rank(step, WINDOWS, params.seed, BATCH, BATCH // size, n, size)[0] for n in range(size)
                ]
                optimizer.zero_grad()
                own = np.concatenate([dealt[rank] for rank in ranks])
                mean_loss(model, reader, own, np.concatenate(dealt)).backward()
                nn.utils.clip_grad_norm_(model.parameters(), params.clip_grad_norm)
                optimizer.step()
                for router in model.routers():
                    router.rebalance(params.bias_update_rate)
            optimizers[number] = copy.deepcopy(optimizer.state_dict())
            moved.append([value.detach().clone() for value in model.parameters()])
            turned.append([router.e_score_correction_bias.clone() for router in model.routers()])
        biases = [sum(values) / len(values) for values in zip(*turned, strict=True)]
        for index, ends in enumerate(zip(*moved, strict=True)):
            gradient = start[index] - sum(ends) / len(ends)
            momentum[index] = 0.9 * momentum[index] + gradient
            start[index] = start[index] - 0.7 * (gradient + 0.9 * momentum[index])
    _set(model, start, biases)
    return Result(weights={name: value.clone() for name, value in model.state_dict().items()})


@torch.no_grad()
def _set(model: LanguageModel, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> None:
    for own, value in zip(model.parameters(), weights, strict=True):
        own.copy_(value)
    for router, bias in zip(model.routers(), biases, strict=True):
        router.e_score_correction_bias.copy_(bias)
