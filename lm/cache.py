"""What the layers keep of the tokens of several texts, in memory that graph runs write in place."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

# Room for this many more tokens is made at a time: rarely enough to copy little, often enough to attend to little room.
_GROWTH = 64


class Cache:
    """The caches of a batch of rows, one text a row.

    ``lengths`` [batch] counts each row's tokens. Making one smaller forgets the tokens at its end.
    """

    def __init__(self, session: onnxruntime.InferenceSession, batch: int) -> None:
        self.lengths: npt.NDArray[np.int64] = np.zeros(batch, np.int64)
        self.capacity = 0
        self._session = session
        self._shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_")}
        self._buffers: dict[str, npt.NDArray[np.float32]] = {}
        self._parts: dict[tuple[int, int], Cache] = {}
        self.binding = session.io_binding()

    def reserve(self, tokens: int, limit: int) -> None:
        """Makes room for ``tokens`` tokens a row, and for some more, but not for more than ``limit``."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, min(-(-tokens // _GROWTH) * _GROWTH, limit))
        sizes = {"batch": len(self.lengths), "capacity": capacity}
        larger = self._zeros({name: [sizes.get(axis, axis) for axis in shape] for name, shape in self._shapes.items()})
        for name in larger:
            for row, length in enumerate(self.lengths if self._buffers else ()):
                self._tokens(name, row, length, larger)[...] = self._tokens(name, row, length)
        self._buffers, self.capacity = larger, capacity
        self._bind()

    def part(self, first: int, stop: int) -> "Cache":
        """Returns the cache of the rows from ``first`` on before ``stop`` alone, which is the same memory.

        It is to be asked for anew when :meth:`reserve` has made room.
        """
        if (first, stop) not in self._parts:
            part = Cache(self._session, stop - first)
            part.lengths, part.capacity = self.lengths[first:stop], self.capacity
            part._buffers = {name: buffer[first:stop] for name, buffer in self._buffers.items()}
            part._bind()
            self._parts[first, stop] = part
        return self._parts[first, stop]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Has the row ``target`` hold the first ``tokens`` tokens of the row ``source``, and no others."""
        if source != target:
            for name in self._buffers:
                self._tokens(name, target, tokens)[...] = self._tokens(name, source, tokens)
        self.lengths[target] = tokens

    def swap(self, one: int, other: int) -> None:
        """Has two rows change places."""
        left, right = self.lengths[[one, other]]
        for name in self._buffers:
            kept = self._tokens(name, one, left).copy()
            self._tokens(name, one, right)[...] = self._tokens(name, other, right)
            self._tokens(name, other, left)[...] = kept
        self.lengths[[one, other]] = self.lengths[[other, one]]

    def _zeros(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, npt.NDArray[np.float32]]:
        # Zeros and not just memory: a weight of zero times what is no number would be no number. The system brings
        # their memory when they are first written: a row that no text has had takes none.
        if len(self.lengths) > 1:
            return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        # In one piece, which numpy asks huge pages for (:mod:`lm.huge_pages`); each would reach over several rows.
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        pieces = np.split(np.zeros(ends[-1], np.float32), ends[:-1])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    def _tokens(
        self, name: str, row: int, count: int, buffers: dict[str, npt.NDArray[np.float32]] | None = None
    ) -> npt.NDArray[Any]:
        """Returns what a buffer has of the first ``count`` tokens of a row."""
        axis = self._shapes[name].index("capacity") - 1
        return (buffers or self._buffers)[name][row][(slice(None),) * axis + (slice(count),)]

    def _bind(self) -> None:
        self._parts.clear()
        for name, buffer in self._buffers.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(name.replace("past_", "present_"), value)
