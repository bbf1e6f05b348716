"""Rounds the weights of a model so that each rounding makes up for those before it (GPTQ, arXiv 2210.17323).

To the nearest level is best for a weight alone. What counts is its product with the inputs that occur: by their second
moments X'X the error of each column is spread over the columns that are still to be rounded, so that |XW' - XQ'| stays
small. The inputs are those of calibration windows, in a model whose earlier blocks are rounded already.

The result lies on its scheme's levels, and rounding it again changes nothing: neither training nor the graph has to
know how it was rounded. For that, the largest weight of each scale stays on the largest level.
"""

import collections
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from lm.graph import SMALLEST_SCALE
from lm.linear import Project
from lm.model import LanguageModel
from lm.quantization import Plan, layers, prepare, replace
from lm.scheme import Levels

# Of the mean of the moments, added to each: few windows leave directions in which nothing was seen.
_DAMPING = 0.01
# The errors of so many columns reach those further on together.
_AT_ONCE = 32


@torch.no_grad()
def compensate(
    model: LanguageModel, plan: Plan, windows: torch.Tensor, told: Callable[[int, int], None] | None = None
) -> LanguageModel:
    """Prepares ``model`` for ``plan`` with its weights rounded by what they meet in ``windows`` [n, T] of token ids.

    Equal arguments give equal bits on machines of one kind with one number of threads. ``told`` hears how many blocks
    of how many are done. A head that was tied to the embedding is not any more: the two are rounded differently.
    """
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    prepare(model, plan).eval()
    decoder = model.model
    cos, sin = decoder.rotations[:, : windows.shape[1]]
    states = [decoder.embed_tokens(window) for window in windows.split(1)]
    for index, block in enumerate(decoder.layers):
        _round(model, f"model.layers.{index}.", plan, (block(x, cos, sin) for x in states))
        for number, x in enumerate(states):
            states[number] = block(x, cos, sin)
        if told is not None:
            told(index + 1, len(decoder.layers) + 1)
    _round(model, "lm_head", plan, (model.lm_head(decoder.norm(x)) for x in states))
    if told is not None:
        told(len(decoder.layers) + 1, len(decoder.layers) + 1)
    model.train()
    return model


def compensated(weight: torch.Tensor, moments: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Returns ``weight`` [out, in] on its levels, for inputs with the second moments ``moments`` [in, in] in fp64."""
    columns = weight.shape[1]
    size = levels.group or columns
    damping = _DAMPING * moments.diagonal().mean()
    # A weight that met nothing, as those of an expert that no token chose, is rounded to the nearest level.
    damped = moments + torch.eye(columns, dtype=moments.dtype, device=moments.device) * (damping if damping > 0 else 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    # Row i: what the columns after column i take over of its error, times the diagonal.
    spread = torch.linalg.cholesky(inverse, upper=True).float()
    # Transposed, so that a column lies in one piece.
    left = weight.float().T.contiguous()
    for start in range(0, columns, _AT_ONCE):
        end = min(start + _AT_ONCE, columns)
        if start % size == 0:
            most, largest = left[start : start + size].abs().max(dim=0)
            scales = (most / levels.most).clamp(min=SMALLEST_SCALE)
        errors = torch.empty_like(left[start:end])
        for column in range(start, end):
            value = left[column]
            level = (value / scales).round().clamp(-levels.most, levels.most)
            level = torch.where(largest == column - start // size * size, value.sign() * levels.most, level)
            error = errors[column - start] = (value - level * scales) / spread[column, column]
            left[column + 1 : end] -= spread[column, column + 1 : end, None] * error
            left[column] = level * scales
        left[end:] -= spread[start:end, end:].T @ errors
    return left.T.contiguous()


def _round(model: LanguageModel, prefix: str, plan: Plan, passes: Iterable[torch.Tensor]) -> None:
    """Rounds the layers whose names begin with ``prefix``, by what they meet in ``passes``, which give nothing else."""
    moments = _Moments()
    chosen = {name: layer for name, layer in layers(model).items() if name.startswith(prefix)}
    for name, layer in chosen.items():
        levels = plan.of(name).levels
        if levels is not None:
            replace(name, layer, partial(moments.watch, levels))
    # One at a time: a large vocabulary's logits of all windows may be more than the model.
    collections.deque(passes, maxlen=0)
    prepare(model, plan)
    for weight, levels, found in moments.of_weight.values():
        weight.copy_(compensated(weight, found, levels))


class _Moments:
    """The second moments of what each weight is multiplied by; a layer's experts are weights of their own."""

    def __init__(self) -> None:
        self.of_weight: dict[int, tuple[torch.Tensor, Levels, torch.Tensor]] = {}

    def watch(self, levels: Levels, _: str, project: Project) -> Project:
        # An object of its own for each layer: those that are alike would be multiplied as one.
        return partial(self.record, levels, project)

    def record(self, levels: Levels, project: Project, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2).float()
        found = (rows.T @ rows).double()
        _, _, before = self.of_weight.setdefault(weight.data_ptr(), (weight, levels, torch.zeros_like(found)))
        before += found
        return project(x, weight)
