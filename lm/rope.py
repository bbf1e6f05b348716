"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import math

import torch

from lm.config import LinearScaling, Llama3Scaling, ModelConfig, RopeScaling, YarnScaling


def rotations(positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> torch.Tensor:
    """Returns cosines and sines [2, positions, head_dim / 2], fp32, of the angles position x theta^(-2i / head_dim).

    ``scaling`` stretches the angles, and may scale what is returned.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if isinstance(scaling, Llama3Scaling):
        frequencies = _stretched(frequencies, scaling)
    elif isinstance(scaling, LinearScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, YarnScaling):
        frequencies = _stretched_one_by_one(frequencies, head_dim, theta, scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    table = torch.stack([angles.cos(), angles.sin()])
    return table if scaling is None else table * scaling.rotation_scale


def rotations_of(config: ModelConfig) -> torch.Tensor:
    """Returns :func:`rotations` of all positions of a model."""
    return rotations(config.max_position_embeddings, config.rotary_dim, config.rope_theta, config.rope_scaling)


def _stretched(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    # Slow rotations are slowed down by the factor, fast ones are left, those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def _stretched_one_by_one(frequencies: torch.Tensor, head_dim: int, theta: float, scaling: YarnScaling) -> torch.Tensor:
    # The same, but blended by the number of the rotation, between those that turn beta_fast and beta_slow times over
    # the original length; both rounded outwards to whole numbers.
    length = scaling.original_max_position_embeddings
    fast, slow = (
        head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), head_dim - 1)
    # Where both are one number, that rotation is stretched already.
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    share = 1 - ramp.clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As :func:`rotate`, for pairs (x[i], x[i + head_dim / 2]): the layout of Llama and Qwen in Hugging Face."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair (x[2i], x[2i+1]) of ``x`` [..., T, head_dim] by its angle; ``cos``, ``sin`` [T, head_dim / 2].

    The result holds all first members, then all second ones. Queries and keys are permuted alike, so that their
    products are those of the interleaved layout.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
