"""A baseline: an interpolated n-gram model of characters (Witten and Bell 1991, method C, interpolated).

P_k(c | h) = (count(h c) + types(h) P_{k-1}(c | h')) / (count(h) + types(h)), where h' is h without its oldest character
and types(h) counts the distinct characters seen after h. Below order 1 every seen character and "never seen" are
equally likely, and a character never seen is one of Unicode's 1,114,112.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNICODE = 0x110000
Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    contexts: Ints  # sorted keys: (id of the context one shorter) x symbols + the character before it
    counts: Ints  # of each context
    types: Ints  # distinct characters after each context
    grams: Ints  # sorted keys: context id x symbols + character
    gram_counts: Ints


class NGram:
    """A character model of ``order``, trained on ``texts``."""

    def __init__(self, texts: list[str], order: int) -> None:
        self._alphabet = np.unique(_codes("".join(texts)))
        # Two more symbols: a character never seen, and what lies before a document's first character.
        self._unseen = len(self._alphabet)
        self._start = self._unseen + 1
        self._symbols = np.int64(self._unseen + 2)
        self._orders: list[_Order] = []
        columns = self._columns(texts, order)
        own = columns(0)
        context = np.zeros(len(own), dtype=np.int64)
        for back in range(order):
            keys = np.zeros(1, dtype=np.int64)
            if back:
                # In place: a copy more of millions of characters is half a gigabyte.
                context *= self._symbols
                context += columns(back)
                keys, context = np.unique(context, return_inverse=True)
            grams, gram_counts = np.unique(context * self._symbols + own, return_counts=True)
            types = np.bincount(grams // self._symbols, minlength=len(keys))
            self._orders.append(_Order(keys, np.bincount(context, minlength=len(keys)), types, grams, gram_counts))

    def bits(self, texts: list[str]) -> Floats:
        """Returns the bits that each of ``texts`` costs under the model: [len(texts)]."""
        columns = self._columns(texts, len(self._orders))
        own = columns(0)
        probability = np.full(len(own), 1 / (self._unseen + 1))
        context = np.zeros(len(own), dtype=np.int64)
        for back, order in enumerate(self._orders):
            if back:
                context = _find(order.contexts, context * self._symbols + columns(back), known=context >= 0)
            known = context >= 0
            here = context[known]
            gram = _find(order.grams, here * self._symbols + own[known], known=np.ones(len(here), dtype=bool))
            count = np.where(gram >= 0, order.gram_counts[gram], 0)
            types = order.types[here]
            probability[known] = (count + types * probability[known]) / (order.counts[here] + types)
        probability[own == self._unseen] /= UNICODE
        ends = np.cumsum([len(text) for text in texts])
        totals = np.concatenate([[0.0], np.cumsum(-np.log2(probability))])
        return np.diff(totals[np.concatenate([[0], ends])])

    def _columns(self, texts: list[str], order: int) -> Callable[[int], Codes]:
        # What is returned gives for k, below order, the symbol k characters before each character, within its document.
        before = np.full(order - 1, self._start, dtype=np.int32)
        padded = np.concatenate([part for text in texts for part in (before, self._encode(text))])
        inside = padded[order - 1 :] != self._start
        return lambda back: padded[order - 1 - back : len(padded) - back][inside]

    def _encode(self, text: str) -> Codes:
        codes = _codes(text)
        index = np.searchsorted(self._alphabet, codes)
        seen = self._alphabet[np.minimum(index, self._unseen - 1)] == codes
        return np.where(seen, index, self._unseen).astype(np.int32)


def _codes(text: str) -> Ints:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)


def _find(keys: Ints, wanted: Ints, known: npt.NDArray[np.bool_]) -> Ints:
    # The index of each wanted key, -1 where it is missing or was not known to begin with.
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(known & (keys[index] == wanted), index, -1)
