"""Which split a document belongs to.

A group's is a pure function of the seed and its name, whatever else the corpus holds; that of a text that several
groups hold is the first of theirs, in the order of :data:`SPLITS`.
"""

from typing import Literal

import xxhash

from tasks.ingest.params import Split

SplitName = Literal["train", "valid", "test"]
# A text belongs to the first of these that a group that holds it is in.
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")


def split_of(group: bytes, split: Split) -> SplitName:
    """Returns the split of ``group``: of many groups a share of ``split.valid`` and ``split.test`` go to those two.

    A group keeps its split when others come or go. What becomes of a text that several hold: :class:`Texts`.
    """
    position = xxhash.xxh3_64_intdigest(f"{split.seed}\0".encode() + group) / 2**64
    if position < split.test:
        return "test"
    return "valid" if position < split.test + split.valid else "train"


class Texts:
    """Which split each text belongs to, by its digest, as far as the groups that hold it are known.

    In whatever order they come, the result is the same, and with more of them a text moves towards train alone.
    """

    def __init__(self) -> None:
        self._texts: dict[SplitName, set[bytes]] = {name: set() for name in SPLITS}
        self._left: set[SplitName] = set()

    def add(self, digest: bytes, split: SplitName) -> bool:
        """Takes a text that a group of ``split`` holds; returns whether that is new and the text belongs there."""
        place = SPLITS.index(split)
        if any(digest in self._texts[name] for name in SPLITS[: place + 1]):
            return False
        self._texts[split].add(digest)
        for name in SPLITS[place + 1 :]:
            if digest in self._texts[name]:
                self._texts[name].remove(digest)
                self._left.add(name)
        return True

    def belongs(self, digest: bytes, split: SplitName) -> bool:
        return digest in self._texts[split]

    def left(self) -> list[SplitName]:
        """Returns the splits to which texts belonged for a time."""
        return [name for name in SPLITS if name in self._left]
