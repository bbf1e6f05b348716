"""A model of which each process holds a part: FSDP2, with the other axes beneath it.

Outside the experts, ``shard`` and ``expert`` are one axis over which weights, gradients and moments are cut. An expert
lies in one place of ``expert``, cut over ``shard``.
"""

import copy
import functools

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from lm.feed_forward import MixtureOfExperts
from lm.model import LanguageModel
from lm.weights import Weights, fill
from tasks.order import Indices
from tasks.parallel import parts, whole
from tasks.parallel.expert import deal_out
from tasks.parallel.gathered import Gathered
from tasks.parallel.parts import Kept, Saved
from tasks.parallel.tensor import InParts, cut_regions
from tasks.parallel.vocabulary import cut_vocabulary
from tasks.world import Meshes, World


class Sharded:
    """A part of the model in each process, and whole blocks only while they compute."""

    def __init__(self, model: LanguageModel, world: World, weights: Weights) -> None:
        """``model`` is on ``meta``, with ``weights`` to read."""
        assert world.mesh is not None
        # The modules twice: laying out replaces the parameters of the copy, and the shapes of the others are read by.
        self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        self._in_parts = _shard(self.model, model, world.mesh)
        fill(self.model, weights, functools.partial(whole.filled, device=world.device))
        self._gathered = Gathered(self.model, world.writers)
        self._reduces = True
        self.scale, self.weight = 1.0, 1 / world.data_size

    def loss(self, windows: torch.Tensor, over: float) -> torch.Tensor:
        loss = self.model.loss(windows)
        if loss.requires_grad:
            # The mean over the processes: their gradients are summed.
            loss.register_hook(lambda gradient: gradient * self.weight)
        return loss / over

    def reduce_in_backward(self, reduce: bool) -> None:
        self._reduces = reduce
        for module in sharded_modules(self.model):
            module.set_requires_gradient_sync(reduce, recurse=False)

    def grouped(self, samples: Indices) -> Indices:
        return samples

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.scale).backward()
        if self._reduces and self._in_parts is not None:
            self._in_parts.sum_gradients()

    def evaluate(self, windows: torch.Tensor) -> torch.Tensor:
        return self.model.loss(windows)

    def clip(self, max_norm: float) -> torch.Tensor:
        return whole.clip_grad_norm(self.model.parameters(), max_norm)

    def state(self, optimizer: torch.optim.Optimizer) -> Kept:
        self._cut()
        return parts.kept(self.model, optimizer)

    def load_state(self, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
        self._cut()
        parts.load(self.model, optimizer, saved)

    def whole(self, name: str) -> torch.Tensor:
        self._cut()
        return self._gathered.tensor(name)

    def _cut(self) -> None:
        # After a forward pass alone, as validation is one, the outermost weights stay whole until a backward pass.
        for module in sharded_modules(self.model):
            module.reshard()


def _shard(model: LanguageModel, original: LanguageModel, mesh: Meshes) -> InParts | None:
    in_parts = None
    if mesh.dense["tensor"].size() > 1:
        in_parts = cut_regions(model, mesh.dense["tensor"])
        cut_vocabulary(model, mesh.dense["tensor"], mesh.layout.shard * mesh.layout.expert)
    for layer, source in zip(model.blocks(), original.blocks(), strict=True):
        shard_layer(layer, mesh)
        release(source)
    fully_shard(model, mesh=mesh.dense["replicate", "dense"])
    # The loss reads the head's weights itself.
    register_fsdp_forward_method(model, "loss")
    release(original)
    sum_gradients(model)
    return in_parts


def shard_layer(layer: nn.Module, mesh: Meshes, gather_again: bool = True) -> None:
    """Cuts a block in place. ``gather_again``: its weights are whole while it computes, not until the backward pass."""
    if mesh.experts["expert"].size() > 1 and isinstance(layer.mlp, MixtureOfExperts):
        deal_out(layer.mlp.experts, mesh.experts["expert"])
        # Along another dimension than `expert` cuts.
        fully_shard(
            layer.mlp.experts,
            mesh=mesh.experts["replicate", "shard"],
            shard_placement_fn=lambda _: Shard(1),
            reshard_after_forward=gather_again,
        )
    fully_shard(layer, mesh=mesh.dense["replicate", "dense"], reshard_after_forward=gather_again)


def sum_gradients(model: nn.Module) -> None:
    """Makes FSDP sum the gradients of ``model`` over the processes, without a divisor."""
    for module in sharded_modules(model):
        # Sums, for `loss` has divided already: an expert's gradient is summed over fewer processes than a dense one and
        # has to be divided by as many. torch divides twice where a sum and another divisor meet one shard.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def release(module: nn.Module) -> None:
    """Gives up the memory of a module's weights. Those on ``meta`` have none, and keep their shapes."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.new_empty(0)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Returns the modules of ``model`` whose weights FSDP2 has cut and gathers."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
