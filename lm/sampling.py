"""Which token comes next, with numpy alone."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
# Far beyond these, a penalty is no number of 32 bits any more, or what it makes of a logit is none.
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0
# A lower temperature takes the likeliest token as well: another one's share is zero, and the quotient may overflow.
_COLDEST = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: equal values draw equal tokens.

    A ``temperature`` of 0 takes the likeliest token. Others are drawn from the ``top_k`` likeliest (0: from all), and
    of these from the fewest that together have the probability ``top_p`` (nucleus sampling, arXiv 1904.09751). Tokens
    that the text has already are made less likely by ``repetition_penalty`` above 1 (arXiv 1909.05858, section 4.1).
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def draw(self, logits: Logits, text: npt.NDArray[np.int64], random: np.random.Generator) -> int:
        """Returns a token for ``logits`` [vocabulary] after the tokens ``text`` [length]."""
        if self.repetition_penalty != 1:
            logits = self._penalize(logits, text)
        if self.temperature < _COLDEST:
            return int(logits.argmax())
        kept = self._likeliest(logits)
        weights = np.exp((logits[kept] - logits[kept[0]]).astype(np.float64) / self.temperature)
        shares = weights / weights.sum()
        if self.top_p < 1:
            # The one that reaches the probability is the last that is kept.
            count = int(np.searchsorted(np.cumsum(shares), self.top_p)) + 1
            kept, shares = kept[:count], shares[:count] / shares[:count].sum()
        return int(random.choice(kept, p=shares))

    def _likeliest(self, logits: Logits) -> npt.NDArray[np.int64]:
        if not 0 < self.top_k < len(logits):
            return np.argsort(-logits, kind="stable")
        # Sorting a vocabulary for each token would cost as much as a small model.
        some = np.sort(np.argpartition(-logits, self.top_k - 1)[: self.top_k])
        return some[np.argsort(-logits[some], kind="stable")]

    def _penalize(self, logits: Logits, text: npt.NDArray[np.int64]) -> Logits:
        logits = logits.copy()
        seen = np.unique(text)
        penalty = np.float32(self.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        return logits


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """Returns how many characters at the end of ``text`` may be the beginning of one of ``stops``."""
    longest = 0
    for stop in stops:
        for length in range(longest + 1, min(len(stop), len(text) + 1)):
            if text.endswith(stop[:length]):
                longest = length
    return longest
