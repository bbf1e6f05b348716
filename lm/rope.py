"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import math

import torch

from lm.config import RopeScaling


def rotations(positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> torch.Tensor:
    """Returns cosines and sines [2, positions, head_dim / 2], fp32, of the angles position x theta^(-2i / head_dim)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is not None:
        frequencies = _stretched(frequencies, scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def _stretched(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    # Slow rotations are slowed down by the factor, fast ones are left, those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
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
