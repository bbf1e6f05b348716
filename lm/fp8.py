"""Weights in FP8 with a scale for each block, as DeepSeek-V3 and Qwen3 are published (arXiv 2412.19437, section 3.3.2).

``NAME.weight`` [out, in] is of the type F8_E4M3. Beside it lies ``NAME.weight_scale_inv``, by whose entries the blocks
are multiplied; ``quantization_config`` in ``config.json`` says how large these are, and the last ones may be smaller.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lm.hugging_face_config import Block
from lm.weights import Region

# How safetensors calls the type.
TYPE = "F8_E4M3"
# Matrices alone have blocks.
DIMENSIONS = 2


def scale_name(weight: str) -> str:
    """Returns the name of the scales of the tensor ``weight``."""
    return f"{weight}_scale_inv"


def scale_shape(weight: Sequence[int], block: Block) -> list[int]:
    """Returns the shape of the scales of a matrix of the shape ``weight``."""
    return [-(-size // of_block) for size, of_block in zip(weight, block, strict=True)]


class Around(NamedTuple):
    """Whole blocks around a region of a matrix: in it, in its scales, and the region within those blocks."""

    weight: Region
    scales: Region
    inner: Region


def blocks_around(region: Region, shape: Sequence[int], block: Block) -> Around:
    """Returns the least blocks of a matrix of that ``shape`` that a ``region`` lies in."""
    along = list(zip(region, shape, block, strict=True))
    scales = tuple(slice(part.start // size, -(-part.stop // size)) for part, _, size in along)
    weight = tuple(
        slice(part.start * size, min(part.stop * size, whole))
        for part, (_, whole, size) in zip(scales, along, strict=True)
    )
    inner = tuple(
        slice(part.start - outer.start, part.stop - outer.start) for part, outer in zip(region, weight, strict=True)
    )
    return Around(weight, scales, inner)


def widened(weight: torch.Tensor, scales: torch.Tensor, block: Block) -> torch.Tensor:
    """Returns ``weight`` [out, in] in fp32, each block multiplied by its entry of ``scales``."""
    rows, columns = weight.shape
    by_row = scales.float().repeat_interleave(block[0], 0)[:rows]
    return weight.float() * by_row.repeat_interleave(block[1], 1)[:, :columns]
