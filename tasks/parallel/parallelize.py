"""Lays a model over the processes. The model knows nothing of it, and neither does the training loop.

One process trains as it would without all this. Where several hold the whole model, torch's DistributedDataParallel
averages gradients, as it does everywhere.
Any other mesh goes through FSDP2: one all-gather a block before it computes, one reduction of its gradients behind it.
Of a pipeline each stage does so by itself.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lm.model import LanguageModel
from lm.weights import Weights
from tasks.order import Indices
from tasks.parallel.alone import Alone
from tasks.parallel.compressed import compressed
from tasks.parallel.diloco import Diloco, replica_of
from tasks.parallel.exchange import Exchange
from tasks.parallel.parts import Kept, Saved
from tasks.parallel.pipeline import Pipelined
from tasks.parallel.sharded import Sharded
from tasks.training_params import TrainingParams
from tasks.world import World


class Parallel(Protocol):
    """A model over all processes. Every method is called on each of them, in the same order."""

    model: LanguageModel
    """What this process computes with; its parameters are what an optimizer takes."""
    scale: float
    """By what the gradients of the next backward passes are multiplied: fp16's loss scale, else 1."""
    weight: float
    """What this process's gradients count where they are reduced: 1 where a mean is taken, else 1 over their number."""

    def grouped(self, samples: Indices) -> Indices:
        """Returns a step's ``samples`` [passes, micro-batch] of this process, a row for each call of :meth:`loss`."""

    def loss(self, windows: torch.Tensor, over: float) -> torch.Tensor:
        """Returns the mean loss of this process's ``windows``, as :meth:`LanguageModel.loss` takes them, ``over`` that.

        A pipeline has passed back the gradients of just this when it returns.
        """

    def backward(self, loss: torch.Tensor) -> None:
        """Adds up the gradients of what :meth:`loss` returned last, scaled as ``loss`` is, and by :attr:`scale`."""

    def evaluate(self, windows: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of ``windows`` without a thought of gradients; of a pipeline, 0 but at its end."""

    def reduce_in_backward(self, reduce: bool) -> None:
        """Says whether the next backward pass sums its gradients over the processes, or only adds up its own."""

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scales the gradients down to ``max_norm`` over all parameters; returns the norm that they had."""

    def state(self, optimizer: torch.optim.Optimizer) -> Kept:
        """Returns this process's part of the state of model and optimizer; see :mod:`tasks.parallel.parts`.

        Every mesh can take it over. Without the weights that are frozen: they are what training began with.
        """

    def load_state(self, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
        """Takes over what the processes, of this mesh or another, have ``saved``."""

    def whole(self, name: str) -> torch.Tensor:
        """Returns the weight or buffer of that name, on the CPU of the first process; on ``meta`` in the others."""


def lay_out(
    model: LanguageModel, world: World, params: TrainingParams, weights: Weights | None = None
) -> tuple[Parallel, Exchange]:
    """Returns ``model`` laid over ``world`` as :func:`parallelize` does, and what its replicas exchange otherwise."""
    exchange = params.exchange
    if exchange.diloco.inner_steps:
        near = replica_of(world)
        parallel: Parallel
        if near.mesh is None:
            parallel = Alone(model, near, world.is_first)
        else:
            assert weights is not None
            parallel = Sharded(model, near, weights)
        return parallel, Diloco(parallel.model, near, world, exchange.diloco, exchange.compression == "int8")
    if exchange.compression != "none":
        parallel = Alone(model, world)
        return parallel, compressed(parallel.model, world, exchange.compression, exchange.rank, params.seed)
    return parallelize(model, world, weights), Exchange(world)


def parallelize(model: LanguageModel, world: World, weights: Weights | None = None) -> Parallel:
    """Returns ``model`` laid over ``world``: moved to the world's device or, where that has a mesh, cut.

    There ``model`` is on ``meta``, and each process reads its part of ``weights``.
    """
    if world.size == 1:
        return Alone(model, world)
    if world.mesh is None:
        return Replicated(model, world)
    assert weights is not None
    return (Sharded if world.stages_group is None else Pipelined)(model, world, weights)


class _Loss(nn.Module):
    # DistributedDataParallel prepares its reduction in forward, so forward has to end in the loss.
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return self.model.loss(windows)


class Replicated(Alone):
    """The whole model in every process."""

    def __init__(self, model: LanguageModel, world: World) -> None:
        super().__init__(model, world)
        # Without find_unused_parameters DDP lays its buckets out anew after the first step, and a resumed run, whose
        # first step is another one, would sum in another order: with three or more processes its bytes would differ.
        self._parallel = DistributedDataParallel(
            _Loss(model), forward_sync_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
        )

    def loss(self, windows: torch.Tensor, over: float) -> torch.Tensor:
        loss: torch.Tensor = self._parallel(windows)
        return loss / over

    def reduce_in_backward(self, reduce: bool) -> None:
        self._parallel.require_backward_grad_sync = reduce
