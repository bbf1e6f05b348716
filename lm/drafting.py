"""Guesses at the next tokens from the text itself, with numpy alone.

The model then reads the guesses at once and keeps those that it writes itself: a graph run over a few tokens costs
little more than one over a single one. Speculative decoding (arXiv 2211.17192) with a lookup in the text in place of a
second model (arXiv 2304.04487). Sums over several tokens are taken in another order than over one, so a text may turn
where two tokens are nearly alike.
"""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
# Fewer than two tokens alike say little about what comes next; more than six say no more than six.
_SHORTEST, _LONGEST = 2, 6
# So many guesses at first and at most. Wrong ones cost time, so there are fewer after some of them were wrong.
_FIRST, MOST = 3, 7


class Drafter:
    """Guesses for one text, as many as lately came true."""

    def __init__(self, most: int = MOST) -> None:
        """``most``: so many guesses at a time at most; 0: none ever."""
        self._most = most
        self._count = min(_FIRST, most)
        # How many tokens were guessed in all, and how many of them came true.
        self.drafted = self.accepted = 0

    def draft(self, text: Ids, room: int) -> list[int]:
        """Returns tokens that may come after ``text`` [length], at most ``room``."""
        found: list[int] = what_followed(text, min(self._count, room)).tolist()
        return found

    def learn(self, drafted: int, accepted: int) -> None:
        """Takes note that the first ``accepted`` of ``drafted`` tokens came true."""
        self.drafted += drafted
        self.accepted += accepted
        if accepted < drafted:
            self._count = max(1, self._count // 2)
        elif drafted == self._count:
            self._count = min(self._most, 2 * self._count)


def what_followed(text: Ids, most: int) -> Ids:
    """Returns up to ``most`` tokens that followed where the end of ``text`` [length] stood before, [] if nowhere.

    Of several such places it is the last of those that agree with most of the end's tokens, up to six. What lies
    between it and the end is repeated where it is shorter.
    """
    if most <= 0 or len(text) <= _SHORTEST:
        return text[:0]
    # Each place is that of the last token of what is alike.
    places = np.flatnonzero(text[:-1] == text[-1])
    for back in range(1, _LONGEST):
        longer = places[places >= back]
        longer = longer[text[longer - back] == text[-1 - back]]
        if not len(longer):
            if back < _SHORTEST:
                return text[:0]
            break
        places = longer
    return np.resize(text[places[-1] + 1 :], most)
