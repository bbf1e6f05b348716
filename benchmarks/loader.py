"""The loader against raw ``np.memmap`` windows and against plain h5py slices, on 512 MB of tokens in the page cache.

All three fill batches of random windows of 2,049 uint16 tokens; ours also decides which windows these are.
Run: .venv/bin/python benchmarks/loader.py
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from pairs import compare

from tasks import shards
from tasks.order import batch_of_rank
from tasks.shards import Manifest, ShardEntry, Shards, WindowReader

LENGTH = 2048
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="of tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=40, help="a round and side")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write(folder, arguments.megabytes * 2**20 // 2)
        reader = Shards(folder, manifest, "train").reader(LENGTH)
        sides = {
            "overnight": lambda: rate(ours(reader), arguments.batches),
            "np.memmap": lambda: rate(raw(folder / "tokens.bin", len(reader)), arguments.batches),
            "h5py slices": lambda: rate(sliced(folder, manifest, reader), arguments.batches),
        }
        for side in sides.values():
            side()
        compare(sides, arguments.rounds, "windows/s", {"np.memmap": 0.9, "h5py slices": 10}, "overnight")


def write(folder: Path, tokens: int) -> Manifest:
    """Writes the same random tokens as four shards and as one raw file."""
    generator = np.random.default_rng(0)
    entries = []
    with (folder / "tokens.bin").open("wb") as raw_file:
        for index in range(4):
            part = generator.integers(0, 2**16, tokens // 4, dtype=np.uint16)
            content = shards.encode_shard(part, np.array([0, len(part)]), np.array([len(part)]))
            name = f"train-{index:05d}.h5"
            (folder / name).write_bytes(content)
            entries.append(
                ShardEntry(
                    file=name,
                    split="train",
                    digest=shards.digest(content),
                    tokens=len(part),
                    documents=1,
                    bytes=len(part),
                )
            )
            raw_file.write(part.tobytes())
    return Manifest(
        vocab_size=2**16, bos_token_id=0, eos_token_id=0, dtype="uint16", tokenizer_digest="", shards=entries
    )


def rate(batch: Callable[[int], object], batches: int) -> float:
    """Returns windows a second over ``batches`` calls of ``batch(step)``."""
    started = time.perf_counter()
    for step in range(batches):
        batch(step)
    return batches * BATCH / (time.perf_counter() - started)


def ours(reader: WindowReader) -> Callable[[int], object]:
    def batch(step: int) -> object:
        return reader.batch(batch_of_rank(step, len(reader), 1, BATCH, BATCH, 0, 1)[0])

    return batch


def raw(path: Path, windows: int) -> Callable[[int], object]:
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    generator = np.random.default_rng(1)

    def batch(step: int) -> object:
        filled = np.empty((BATCH, LENGTH + 1), dtype=np.uint16)
        for row, index in enumerate(generator.integers(0, windows, BATCH).tolist()):
            filled[row] = tokens[index * LENGTH : index * LENGTH + LENGTH + 1]
        return filled

    return batch


def sliced(folder: Path, manifest: Manifest, reader: WindowReader) -> Callable[[int], object]:
    files = [h5py.File(folder / entry.file, "r")["tokens"] for entry in manifest.shards]
    generator = np.random.default_rng(1)
    each = (manifest.shards[0].tokens - 1) // LENGTH

    def batch(step: int) -> object:
        filled = np.empty((BATCH, LENGTH + 1), dtype=np.uint16)
        for row, index in enumerate(generator.integers(0, len(reader), BATCH).tolist()):
            start = index % each * LENGTH
            filled[row] = files[index // each][start : start + LENGTH + 1]
        return filled

    return batch


if __name__ == "__main__":
    main()
