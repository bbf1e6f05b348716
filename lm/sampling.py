"""Which token comes next, with numpy alone."""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
# Far beyond these, a penalty is no number of 32 bits any more, or what it makes of a logit is none.
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0
# A lower temperature takes the likeliest token as well: another one's share is zero, and the quotient may overflow.
_COLDEST = 1e-5
# Of a large vocabulary, nearly all that is drawn is among so many tokens.
_AT_FIRST = 1024


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: equal values draw equal tokens.

    A ``temperature`` of 0 takes the likeliest token. Others are drawn from the ``top_k`` likeliest (0: from all), and
    of these from the fewest that together have the probability ``top_p`` (nucleus sampling, arXiv 1904.09751). Tokens
    that the text has already are made less likely by ``repetition_penalty`` above 1 (arXiv 1909.05858, section 4.1).
    From the logit of a token that was written, and not given, ``presence_penalty`` is taken once and
    ``frequency_penalty`` for each time; ``bias`` is what is added to the logits of single tokens (as OpenAI has them).
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    def draw(self, logits: Logits, text: npt.NDArray[np.int64], random: np.random.Generator, given: int = 0) -> int:
        """Returns a token for ``logits`` [vocabulary] after ``text`` [length], ``given`` of which are the prompt.

        Raises :class:`ValueError` where one of ``logits`` is no number, or the largest not finite.
        """
        logits = self._adjusted(logits, text, text[given:])
        # Where there is a NaN, that is the one.
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise ValueError("the model is damaged: a logit is no number")
        if self.temperature < _COLDEST:
            return best
        kept = likeliest(logits, self.top_k or _AT_FIRST)
        reached = np.cumsum(self._weights(logits[kept], logits[kept[0]]))
        number, whole = random.random(), reached[-1]
        if self.top_k == 0 and len(kept) < len(logits):
            # Sorting all of a vocabulary for each token may cost more than the model: only where these are too few.
            whole = self._weights(logits, logits[kept[0]]).sum()
            if reached[-1] <= whole * (self.top_p if self.top_p < 1 else number):
                kept = likeliest(logits, 0)
                reached = np.cumsum(self._weights(logits[kept], logits[kept[0]]))
                whole = reached[-1]
        if self.top_p < 1:
            # The one that reaches the probability is the last that is kept.
            reached = reached[: int(np.searchsorted(reached, self.top_p * whole)) + 1]
            whole = reached[-1]
        # A product that is rounded up may be all of it.
        place = min(int(np.searchsorted(reached, number * whole, side="right")), len(reached) - 1)
        return int(kept[place])

    def _weights(self, logits: Logits, highest: np.float32) -> npt.NDArray[np.float64]:
        """Returns what ``logits`` weigh beside the ``highest``, which weighs 1."""
        return np.exp((logits - highest).astype(np.float64) / self.temperature)

    def _adjusted(self, logits: Logits, text: npt.NDArray[np.int64], written: npt.NDArray[np.int64]) -> Logits:
        again = self.presence_penalty or self.frequency_penalty
        if self.repetition_penalty == 1 and not again and not self.bias:
            return logits
        logits = logits.copy()
        if self.repetition_penalty != 1:
            seen = np.unique(text)
            penalty = np.float32(self.repetition_penalty)
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        if again:
            tokens, counts = np.unique(written, return_counts=True)
            logits[tokens] -= (self.presence_penalty + self.frequency_penalty * counts).astype(np.float32)
        if self.bias:
            tokens, added = self._bias
            logits[tokens] += added
        return logits

    @functools.cached_property
    def _bias(self) -> tuple[npt.NDArray[np.int64], Logits]:
        tokens, added = zip(*self.bias, strict=True)
        return np.array(tokens, np.int64), np.array(added, np.float32)


def likeliest(logits: Logits, count: int) -> npt.NDArray[np.int64]:
    """Returns the ``count`` likeliest tokens by ``logits`` [vocabulary], best first; all for 0."""
    if not 0 < count < len(logits):
        return np.argsort(-logits, kind="stable")
    # Sorting a vocabulary for each token would cost as much as a small model.
    some = np.sort(np.argpartition(-logits, count - 1)[:count])
    return some[np.argsort(-logits[some], kind="stable")]


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """Returns how many characters at the end of ``text`` may be the beginning of one of ``stops``."""
    longest = 0
    for stop in stops:
        # The first place where the rest of the text begins a stop.
        place = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while place >= 0 and not stop.startswith(text[place:]):
            place = text.find(stop[0], place + 1)
        if place >= 0:
            longest = max(longest, len(text) - place)
    return longest
