"""Which layers are a pipeline's stage, and what a stage computes."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lm.config import GroupedConfig
from lm.feed_forward import Experts
from lm.model import LanguageModel
from tasks.world import World

EMBED_AGAIN = "embed_again"


class Stage(nn.Module):
    """Consecutive blocks of ``model``: hidden states [B, T, D] to hidden states; the first one takes ids [B, T].

    The modules are those of ``model``. The last stage ends with the final norm. Between stages a process has its share
    of the T tokens, where the mesh cuts them.
    """

    def __init__(self, model: LanguageModel, layers: range, world: World) -> None:
        super().__init__()
        # Looked up when it is called, for it may be laid out later; in a list, for a module's parts are its own.
        self._world, self._whole = world, [model]
        self.embed_tokens = model.model.embed_tokens if not layers.start else None
        self.layers = nn.ModuleList(model.model.layers[layer] for layer in layers)
        is_last = layers.stop == len(model.model.layers)
        self.norm = model.model.norm if is_last else None
        self.lm_head = model.lm_head if is_last else None
        # What predicts further tokens reads the embedding again, and is used for the loss alone.
        self.mtp = model.mtp if is_last else None
        self.embed_again = getattr(model, EMBED_AGAIN, None) if is_last else None
        self._rotations = model.model.rotations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not around the schedule, whose backward passes would come under it.
        with self._world.autocast():
            positions = x.shape[1]
            if self.embed_tokens is not None:
                x = self.embed_tokens(x)
                if torch.is_grad_enabled() and not x.requires_grad:
                    # Of frozen weights: a schedule passes gradients back through every stage.
                    x.requires_grad_()
            elif self._world.mesh is not None:
                positions *= self._world.mesh.layout.tensor
            cos, sin = self._rotations[:, :positions]
            for layer in self.layers:
                x = layer(x, cos, sin)
            return x if self.norm is None else self.norm(x)

    def loss(self, x_BTD: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy of what the last stage made, in nats.

        ``targets`` [B, T], or [B, 2, T] with what of them counts, as in :meth:`LanguageModel.loss`.
        """
        with self._world.autocast():
            return self._whole[0].loss_from(x_BTD, F.pad(targets, [1, 0]))


def stages_of(model: LanguageModel, stages: int) -> list[range]:
    """Returns the layers of each of ``stages`` stages, cut so that the largest is as small as can be.

    A stage's size is the parameters that multiply a token, which is its time, and all its parameters, which is its
    memory, added up. So the head counts twice, the embedding once, and an idle expert once. Of multi-token prediction
    each depth multiplies by the head again, which is there already.
    """
    head, embedding = model.lm_head.weight.numel(), model.model.embed_tokens.weight.numel()
    sizes = [_size(layer, model) for layer in model.model.layers]
    sizes[0] += embedding
    sizes[-1] += 2 * head + sum(_size(further, model) + head for further in model.mtp)
    return balanced(sizes, stages)


def balanced(sizes: Sequence[float], parts: int) -> list[range]:
    """Returns ``parts`` consecutive ranges over ``sizes``, none of them empty, whose largest sum is the least."""
    until = [0.0, *itertools.accumulate(sizes)]
    # Of the first `end` sizes in so many parts: the largest sum, and where the last part begins.
    best = {end: (until[end], 0) for end in range(1, len(sizes) + 1)}
    begins = []
    for part in range(1, parts):
        best = {
            end: min((max(best[start][0], until[end] - until[start]), start) for start in range(part, end))
            for end in range(part + 1, len(sizes) + 1)
        }
        begins.append({end: start for end, (_, start) in best.items()})
    ends = [len(sizes)]
    for begin in reversed(begins):
        ends.append(begin[ends[-1]])
    return [range(start, end) for start, end in itertools.pairwise([0, *reversed(ends)])]


def _size(layer: nn.Module, model: LanguageModel) -> float:
    held = sum(parameter.numel() for parameter in layer.parameters())
    if isinstance(model.config, GroupedConfig):
        return 2.0 * held
    experts = [module for module in layer.modules() if isinstance(module, Experts)]
    routed = sum(parameter.numel() for module in experts for parameter in module.parameters())
    return 2 * held - routed * (1 - model.config.num_experts_per_tok / model.config.n_routed_experts)
