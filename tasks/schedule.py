"""The learning rate of each step: a linear warm-up, then one of three ways down to the floor."""

import math

from tasks.training_params import TrainingParams


def learning_rate_at(step: int, params: TrainingParams, peak: float) -> float:
    """Returns the rate of ``step`` (from 0): linear warm-up over ``warmup_fraction`` of the steps, then ``schedule``.

    The ``peak`` is reached at the warm-up's last step. From there a cosine or a straight line goes to
    ``min_learning_rate_ratio`` of it at the last step; ``wsd`` (warm-up, stable, decay; arXiv 2404.06395, section 4)
    stays at the peak and takes the straight line over the last ``decay_fraction`` of the steps.
    """
    warmup = math.ceil(params.warmup_fraction * params.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = params.min_learning_rate_ratio
    if params.schedule == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _share(step, warmup, params))))
    start = warmup
    if params.schedule == "wsd":
        start = max(warmup, params.steps - math.ceil(params.decay_fraction * params.steps))
    return peak * (floor + (1 - floor) * (1 - max(0.0, _share(step, start, params))))


def _share(step: int, start: int, params: TrainingParams) -> float:
    # A way of one step ends at its end.
    last = params.steps - 1
    return (step - start) / (last - start) if start < last else float(step - start + 1)
