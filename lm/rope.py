"""Rotary position embedding on interleaved pairs (RoFormer, arXiv 2104.09864; the layout of DeepSeek's weights)."""

import torch


def rotations(positions: int, head_dim: int, theta: float) -> torch.Tensor:
    """Returns cosines and sines [2, positions, head_dim / 2], fp32, of the angles position x theta^(-2i / head_dim)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair (x[2i], x[2i+1]) of ``x`` [..., T, head_dim] by its angle; ``cos``, ``sin`` [T, head_dim / 2].

    The result holds all first members, then all second ones. Queries and keys are permuted alike, so that their
    products are those of the interleaved layout.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
