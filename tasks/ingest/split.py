"""Which split a document belongs to: a pure function of the seed and its group, whatever else the corpus holds."""

from typing import Literal

import xxhash

from tasks.ingest.params import Split

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")


def split_of(group: bytes, split: Split) -> SplitName:
    """Returns the split of ``group``: of many groups a share of ``split.valid`` and ``split.test`` go to those two.

    A group keeps its split when others come or go, so that nothing that was tested on is later trained on. But a text
    that several groups hold belongs to the one that is read first, by source and file.
    """
    position = xxhash.xxh3_64_intdigest(f"{split.seed}\0".encode() + group) / 2**64
    if position < split.test:
        return "test"
    return "valid" if position < split.test + split.valid else "train"
