"""A stream of bytes, cut into blocks of whole lines; a line over the limit is told apart without being held."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from tasks.ingest.record import Rejection, Size

BLOCK_BYTES = 2**20
_NEWLINE = ord("\n")


class Readable(Protocol):
    """What a stream of bytes must offer."""

    def read(self, nbytes: int, /) -> bytes: ...


@dataclass(frozen=True)
class Block:
    """Whole lines, each ended by ``\\n`` (added to a file's last line when missing). The first is ``first_line``."""

    first_line: int
    data: bytes

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """Where each line's ``\\n`` stands."""
        return np.flatnonzero(np.frombuffer(self.data, dtype=np.uint8) == _NEWLINE)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """Where each line begins."""
        return np.concatenate([np.zeros(1, dtype=np.int64), self.ends[:-1] + 1])

    def __len__(self) -> int:
        return len(self.ends)

    def line(self, index: int) -> bytes:
        """Returns line ``index`` of this block (from 0), without its ``\\n``."""
        return self.data[self.starts[index] : self.ends[index]]

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields each line's number in the file and its bytes, without ``\\n``."""
        return enumerate(self.data.split(b"\n")[:-1], self.first_line)


def cut(
    stream: Readable, max_line_bytes: int, block_bytes: int = BLOCK_BYTES, first_line: int = 1
) -> Iterator[Block | Rejection]:
    """Yields the lines of ``stream`` in blocks, and a rejection for each line of more than ``max_line_bytes`` bytes.

    The ``\\n`` does not count. Memory stays within some ``block_bytes`` + ``max_line_bytes``, however long a line is.
    """
    line = first_line
    rest = pending = b""
    while chunk := pending or stream.read(block_bytes):
        pending = b""
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            block = Block(line, rest + head + newline)
            yield from _without_long_lines(block, max_line_bytes)
            line += len(block)
            rest = tail
        else:
            rest += chunk
        if len(rest) > max_line_bytes:
            rejection, pending = _read_long_line(stream, line, rest, block_bytes)
            yield rejection
            line += 1
            rest = b""
    if rest:
        yield from _without_long_lines(Block(line, rest + b"\n"), max_line_bytes)


def _without_long_lines(block: Block, limit: int) -> Iterator[Block | Rejection]:
    too_long = np.flatnonzero(block.ends - block.starts > limit).tolist()
    first = 0
    for index in [*too_long, len(block)]:
        if first < index:
            yield Block(block.first_line + first, block.data[block.starts[first] : block.ends[index - 1] + 1])
        if index < len(block):
            whole = LongLine(block.first_line + index)
            whole.add(block.line(index))
            yield whole.rejection()
        first = index + 1


def _read_long_line(stream: Readable, line: int, begun: bytes, block_bytes: int) -> tuple[Rejection, bytes]:
    """Returns the rejection of the line that ``begun`` begins, and what was read of the lines after it."""
    whole = LongLine(line)
    whole.add(begun)
    while chunk := stream.read(block_bytes):
        piece, newline, after = chunk.partition(b"\n")
        whole.add(piece)
        if newline:
            return whole.rejection(), after
    return whole.rejection(), b""


class LongLine:
    """The digest and size of a line that is read in pieces, none of which is kept."""

    def __init__(self, line: int) -> None:
        self._line = line
        self._digest = xxhash.xxh3_128()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0
        self._bytes = 0

    def add(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._characters += len(self._decoder.decode(piece))
        self._bytes += len(piece)

    def rejection(self, why: str = "") -> Rejection:
        characters = self._characters + len(self._decoder.decode(b"", final=True))
        size = Size(characters, self._bytes)
        detail = f"{self._bytes:,} bytes{why}"
        return Rejection(self._line, "line too long", self._digest.hexdigest(), size, detail)
