"""A checkpoint in Hugging Face layout in 16 bits a weight: half the size, and how most of them are published.

Imports no torch: weights go through numpy, a file at a time.
"""

import json
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from lm.gguf_tensors import Unfit
from lm.hugging_face_files import CONFIG, INDEX, read_json, system_is_told, weight_files

Kind = Literal["bf16", "f16"]
_TYPES: dict[Kind, npt.DTypeLike] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
# A router's corrections differ by less than 16 bits tell; DeepSeek-V3's and transformers' are fp32 among bf16 as well.
_IN_FLOAT = "e_score_correction_bias"


def write(source: Path, folder: Path, kind: Kind) -> None:
    """Writes the configuration and the weights of the checkpoint in ``source`` into ``folder``, as ``kind``.

    Each number becomes the nearest one, of two equally near ones the even: what was read from such a checkpoint and not
    trained comes out as the same bytes. Raises :class:`Unfit` that names a tensor with numbers beyond those of f16.
    """
    total = 0
    for path in weight_files(source):
        with safe_open(path, framework="numpy") as file:
            tensors = {name: _rounded(name, file.get_tensor(name), kind) for name in file.keys()}  # noqa: SIM118
            with system_is_told(folder / path.name):
                save_file(tensors, folder / path.name, metadata=file.metadata())
        total += sum(tensor.nbytes for tensor in tensors.values())
    if (source / INDEX).is_file():
        _write_json(folder / INDEX, {**read_json(source / INDEX), "metadata": {"total_size": total}}, sort_keys=True)
    _write_json(folder / CONFIG, {**read_json(source / CONFIG), "dtype": np.dtype(_TYPES[kind]).name})


def _rounded(name: str, tensor: npt.NDArray[Any], kind: Kind) -> npt.NDArray[Any]:
    if name.endswith(_IN_FLOAT):
        return tensor
    with np.errstate(over="ignore"):
        rounded = tensor.astype(_TYPES[kind])
    if kind == "f16" and np.isinf(rounded).any():
        raise Unfit(f"{name} has numbers beyond 65,504, the largest in f16; bf16 holds them")
    return rounded


def _write_json(path: Path, content: dict[str, Any], sort_keys: bool = False) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")
