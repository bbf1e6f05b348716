"""The checkpoints of a test, on the disk."""

from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tasks.checkpoints import Checkpoints
from tasks.parallel import parts


def steps(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name.split("-")[1]) for path in sorted(checkpoints.folder.glob("step-*.pt"))]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(".overnight/checkpoints/train/*/*.pt"), reverse=True)


def tensors_of(file: Path, start: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin with ``start``; ``file`` is what its processes share."""
    folder = file.with_name(f"parts-{file.name.split('-')[1]}")
    kinds = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)  # type: ignore[union-attr]
        for name, kind in kinds.items()
        if name.startswith(start)
    }
    parts.read(found, folder)
    return found
