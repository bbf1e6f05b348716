"""How likely the model found the tokens of a text, with numpy alone."""

from dataclasses import dataclass

import numpy as np

from lm.sampling import Logits, likeliest


@dataclass(frozen=True)
class Token:
    """A token that may stand somewhere: what it comes to there, and the logarithm of its probability, in nats.

    The probability is the model's own, before a temperature, penalties or biases. It is None of a text's first token,
    which nothing foretells.
    """

    text: str
    logprob: float | None


@dataclass(frozen=True)
class Scored(Token):
    """A token of a text, which begins ``at`` so many characters in, and the ``likeliest`` in its place, best first."""

    at: int
    likeliest: tuple[Token, ...]


def logprobs(logits: Logits, token: int, most: int) -> tuple[float, list[tuple[int, float]]]:
    """Returns the logarithm of the probability of ``token`` by ``logits`` [vocabulary], in nats.

    And the ``most`` likeliest tokens with theirs, best first.
    """
    # Each sum of 32 bits would take more than what is told of it; its terms do not.
    highest = logits.max()
    whole = float(highest) + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    best = likeliest(logits, most) if most else ()
    return float(logits[token]) - whole, [(int(one), float(logits[one]) - whole) for one in best]
