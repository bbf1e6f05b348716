"""The checkpoints of a test, on the disk."""

from pathlib import Path

from tasks.checkpoints import Checkpoints


def steps(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name.split("-")[1]) for path in sorted(checkpoints.folder.iterdir())]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(".overnight/checkpoints/train/*/*.pt"), reverse=True)
