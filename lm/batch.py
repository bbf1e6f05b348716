"""Texts that one model writes side by side, each of which comes and goes between any two tokens of the others.

A run of the graph reads all weights, for one token or for one of each text; so eight texts take little longer than one.
That texts join one by one and need not wait for each other's end is continuous batching (Orca, Yu et al., OSDI 2022).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lm.cache import Cache
from lm.drafting import Ids
from lm.sampling import Logits
from lm.text import Text

# So many tokens of a prompt are read at once: enough for products of matrices, and they stay in a core's cache.
PIECE = 256


class Model(Protocol):
    """What a batch asks of :class:`lm.runtime.Generator`."""

    context: int

    def new_cache(self, batch: int) -> Cache: ...

    def run(self, ids: Ids, cache: Cache, last: bool = False) -> Logits: ...


@dataclass
class _Row:
    """A row of the cache: the tokens that it holds, and when its last text left it."""

    ids: list[int] = field(default_factory=list)
    left: int = 0


class Batch:
    """At most ``most`` texts side by side; others wait, the first come first.

    While prompts are read, piece by piece, the other texts go on. Where a single text is written it has guesses at its
    next tokens (:mod:`lm.drafting`). A beginning that a text has in common with what a row holds is not computed again.
    """

    def __init__(self, model: Model, most: int) -> None:
        self._model, self._most = model, most
        self._waiting: deque[Text] = deque()
        # The text whose prompt is being read, into a row behind those of the texts that are being written.
        self._reading: Text | None = None
        self._read_into = 0
        # The texts of the first rows.
        self._writing: list[Text] = []
        self._cache = model.new_cache(most)
        self._rows = [_Row() for _ in range(most)]
        self._departures = 0

    def add(self, text: Text) -> None:
        """Has ``text`` written from the next step on that has room for it."""
        self._waiting.append(text)

    def drop(self, text: Text) -> None:
        """Lets ``text`` go where it has not ended."""
        if text is self._reading:
            self._reading = None
            self._depart(self._read_into)
        elif text in self._writing:
            self._leave(self._writing.index(text))
        elif text in self._waiting:
            self._waiting.remove(text)

    @property
    def reads(self) -> bool:
        """Whether there is a prompt to read, and room for it."""
        return self._reading is not None or bool(self._waiting and len(self._writing) < self._most)

    def step(self, read: bool = True) -> list[tuple[Text, str]]:
        """Writes the next token of each text, and reads a piece of a prompt where there is one and ``read`` is true.

        Returns what can be told now of which text; nothing of one whose prompt is read. A text that was told the last
        of is ``done``, and has left; so has one that ``failed``, beside which the others go on.
        """
        told = self._write() if self._writing else []
        if not (read and self.reads):
            return told
        if self._reading is None:
            self._begin(self._waiting.popleft())
        assert self._reading is not None
        return told + self._read(self._reading)

    def _begin(self, text: Text) -> None:
        text.begun = True
        # At least the last token is read: its logits are needed.
        common = [_common(row.ids, [] if text.scores_prompt else text.ids[:-1]) for row in self._rows]
        idle = range(len(self._writing), self._most)
        nearest = max(range(self._most), key=lambda row: (common[row], row in idle))
        row, shared = nearest, common[nearest]
        # Unless nearly all that it holds is this text's beginning, a row stays; the one that was left first is taken.
        if nearest not in idle or 10 * shared < 9 * len(self._rows[nearest].ids):
            row = min(idle, key=lambda one: self._rows[one].left)
        # It is read where it will be written. What is there goes where the other text was.
        place = len(self._writing)
        self._cache.lengths[row] = common[row]
        self._swap(row, place)
        self._cache.copy({row: place, place: row}.get(nearest, nearest), place, shared)
        self._rows[place].ids = text.ids[:shared]
        self._reading, self._read_into = text, place

    def _read(self, text: Text) -> list[tuple[Text, str]]:
        row, held = self._read_into, self._rows[self._read_into].ids
        piece = text.ids[len(held) : len(held) + PIECE]
        logits = self._run(row, [piece], last=not text.scores_prompt)
        first = len(held)
        held += piece
        if text.scores_prompt:
            try:
                text.read(first, logits[0])
            except Exception as error:
                text.failed = error
                self.drop(text)
                return [(text, "")]
        if len(held) < len(text.ids):
            return []
        self._reading = None
        self._swap(row, len(self._writing))
        self._writing.append(text)
        return [self._take(len(self._writing) - 1, [], logits[0, -1:])]

    def _write(self) -> list[tuple[Text, str]]:
        # The last token that was drawn is not in the cache yet. Several tokens of several rows would be a batch of
        # unequal lengths, which not every operator takes.
        guesses = self._writing[0].draft() if len(self._writing) == 1 else []
        new = [[int(text.tokens[-1]), *guesses] for text in self._writing]
        logits = self._run(0, new, last=not guesses)
        # From the last row on: one that leaves is filled by one that has had its token.
        rows = reversed(range(len(new)))
        return [self._take(row, new[row], logits[row]) for row in rows][::-1]

    def _run(self, first: int, ids: Sequence[Sequence[int]], last: bool) -> Logits:
        stop = first + len(ids)
        self._cache.reserve(int(self._cache.lengths[first:stop].max()) + len(ids[0]), self._model.context)
        return self._model.run(np.array(ids, np.int64), self._cache.part(first, stop), last=last)

    def _take(self, row: int, read: list[int], logits: Logits) -> tuple[Text, str]:
        """Has a row's text go on by ``logits``: after its prompt, or after ``read``, its last token and guesses."""
        text, held = self._writing[row], self._rows[row].ids
        try:
            accepted, piece = text.take(read[1:], logits)
        except Exception as error:
            text.failed, accepted, piece = error, 0, ""
        held += read[: 1 + accepted]
        self._cache.lengths[row] = len(held)
        if text.done is not None or text.failed is not None:
            self._leave(row)
        return text, piece

    def _leave(self, row: int) -> None:
        last = len(self._writing) - 1
        self._swap(row, last)
        self._writing[row] = self._writing[last]
        self._writing.pop()
        self._depart(last)

    def _depart(self, row: int) -> None:
        self._departures += 1
        self._rows[row].left = self._departures

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self._cache.swap(one, other)
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
