"""Weights in FP8 with a scale for each block, as DeepSeek-V3 and Qwen3 are published (arXiv 2412.19437, section 3.3.2).

``NAME.weight`` [out, in] is of the type F8_E4M3. Beside it lies ``NAME.weight_scale_inv``, by whose entries the blocks
are multiplied; ``quantization_config`` in ``config.json`` says how large these are, and the last ones may be smaller.
"""

from collections.abc import Sequence

import torch

from lm.hugging_face_config import Block

# How safetensors calls the type.
TYPE = "F8_E4M3"
_SUFFIX = "_scale_inv"
# Matrices alone have blocks.
DIMENSIONS = 2


def scale_name(weight: str) -> str:
    """Returns the name of the scales of the tensor ``weight``."""
    return weight + _SUFFIX


def is_scale(name: str) -> bool:
    """Whether ``name`` is one that :func:`scale_name` returns."""
    return name.endswith(_SUFFIX)


def scale_shape(weight: Sequence[int], block: Block) -> list[int]:
    """Returns the shape of the scales of a matrix of the shape ``weight``."""
    return [-(-size // of_block) for size, of_block in zip(weight, block, strict=True)]


def widened(weight: torch.Tensor, scales: torch.Tensor, block: Block) -> torch.Tensor:
    """Returns ``weight`` [out, in] in fp32, each block multiplied by its entry of ``scales``."""
    rows, columns = weight.shape
    by_row = scales.float().repeat_interleave(block[0], 0)[:rows]
    return weight.float() * by_row.repeat_interleave(block[1], 1)[:, :columns]
