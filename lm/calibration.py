"""Finds the range of each product's activations for :mod:`lm.static`, by what they are in calibration windows.

The whole range would be as wide as the largest value that was seen, and a trained model has values a hundred times
larger than most. So each range is the one with the least squared error over all that was seen, where what is clipped
counts as well as what is rounded.

What was seen is kept as counts by the upper 16 bits of fp32: 65,536 numbers a product however many windows there are,
every value known within 0.4%, and the same counts whatever the order of the tokens.
"""

import dataclasses
from functools import partial

import torch

from lm.linear import Project
from lm.model import LanguageModel
from lm.quantization import Plan, layers, products, replace
from lm.static import Range, Static

_BUCKETS = 2**16
# Each end of a range is tried at 2^(-k / 8) of the furthest value.
_SHARES = 2.0 ** (-torch.arange(64, dtype=torch.float64) / 8)


@torch.no_grad()
def calibrate(model: LanguageModel, plan: Plan, windows: torch.Tensor) -> Plan:
    """Returns ``plan`` with a range for each product that wants one, by what float ``model`` does with ``windows``.

    ``windows`` [n, T] are token ids. A plan that wants no ranges comes back as it is.
    """
    wanting = {
        name: layer
        for name, layer in layers(model).items()
        if any(isinstance(plan.of(name, product), Static) for product in products(name, layer))
    }
    if not wanting:
        return plan
    counts: dict[str, torch.Tensor] = {}
    before: dict[str, Project] = {}

    def watch(product: str, project: Project) -> Project:
        counts[product] = torch.zeros(_BUCKETS, dtype=torch.int64, device=windows.device)
        before[product] = project
        # An object of its own for each layer: those that are alike would be multiplied as one.
        return partial(_counted, counts[product], project)

    trained = model.training
    model.eval()
    for name, layer in wanting.items():
        replace(name, layer, watch)
    for window in windows.split(1):
        model(window)
    for name, layer in wanting.items():
        replace(name, layer, lambda product, _: before[product])
    model.train(trained)
    return dataclasses.replace(plan, ranges={product: best_range(found.cpu()) for product, found in counts.items()})


def best_range(counts: torch.Tensor) -> Range:
    """Returns the range with the least squared error for values that were counted by :func:`buckets`."""
    seen = counts.nonzero().squeeze(1)
    weights = counts[seen].double()
    values = ((seen.int() - _BUCKETS // 2 << 16) + 2**15).view(torch.float32).double()
    lows, highs = (end * _SHARES for end in (values.amin().clamp(max=0), values.amax().clamp(min=0)))
    below, above = (lows[:, None] - values).clamp(min=0), (values - highs[:, None]).clamp(min=0)
    steps = (highs - lows[:, None]) / 255
    error = (below.square() @ weights)[:, None] + above.square() @ weights + _rounding(values, weights, steps)
    best = int(error.argmin())
    return Range.over(float(lows[best // len(highs)]), float(highs[best % len(highs)]))


def buckets(x: torch.Tensor) -> torch.Tensor:
    """Returns the numbers 0 ... 65,535 of the buckets that hold the values of ``x`` in fp32."""
    return (x.float().contiguous().view(torch.int32).flatten() >> 16) + _BUCKETS // 2


def _counted(counts: torch.Tensor, project: Project, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    counts += torch.bincount(buckets(x), minlength=_BUCKETS)
    return project(x, weight)


def _rounding(values: torch.Tensor, weights: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    # Up to half a step a value becomes 0; others lie anywhere between two levels, a twelfth of a squared step off.
    sizes, order = values.abs().sort()
    ordered = weights[order]
    none = torch.zeros(1, dtype=torch.float64)
    lost = torch.cat([none, (ordered * sizes.square()).cumsum(0)])
    count = torch.cat([none, ordered.cumsum(0)])
    small = torch.searchsorted(sizes, steps / 2)
    return lost[small] + (count[-1] - count[small]) * steps.square() / 12
