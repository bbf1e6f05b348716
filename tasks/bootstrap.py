"""Intervals from resampling documents: the unit that varies is the document, not the token."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

NUMBERS_AT_ONCE = 2**22
# What of a normal distribution lies within so many standard deviations is 95%.
_NORMAL = 1.959964
# A number that is a share of what it is divided by.
SHARE = (0.0, 1.0)
Values = npt.NDArray[np.float64]


class Estimate(BaseModel):
    """A number with its 95% interval; ``low`` and ``high`` are None where a single document gives none."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of ``documents`` documents, drawn once, so that all that is estimated is estimated on the same ones."""

    documents: int
    samples: int
    seed: int

    def ratio(
        self,
        numerators: Values,
        denominators: Values,
        scale: float = 1.0,
        within: tuple[float, float] = (-math.inf, math.inf),
    ) -> Estimate:
        """Returns ``scale`` x sum(numerators) / sum(denominators), both [documents], with its interval.

        Both are taken from the same resample, so that a difference between two models over their shared documents is
        paired (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section 4). Neither end lies outside of
        ``within``.
        """
        value = float(scale * numerators.sum() / denominators.sum())
        if self.documents == 1:
            # Every resample would be that document again: an interval of no width, which claims certainty.
            return Estimate(value=round(value, 6), low=None, high=None)
        resampled = np.concatenate(
            [scale * (weights @ numerators) / (weights @ denominators) for weights in self._weights()]
        )
        return self._estimate(value, resampled, within)

    def quantile(self, values: Sequence[Values], share: float) -> Estimate:
        """Returns the least value with ``share`` of all ``values`` (an array a document) at or below it.

        Documents are resampled with all their values.
        """
        flat = np.concatenate(values)
        order = np.argsort(flat, kind="stable")
        flat, document = flat[order], np.repeat(np.arange(len(values)), [len(one) for one in values])[order]

        def found(weights: Values) -> float:
            counts = np.cumsum(weights[document])
            return float(flat[np.searchsorted(counts, share * counts[-1])])

        value = found(np.ones(len(values)))
        if self.documents == 1:
            return Estimate(value=round(value, 6), low=None, high=None)
        resampled = np.array([found(weights) for some in self._weights() for weights in some])
        return self._estimate(value, resampled, (0.0, math.inf))

    def _estimate(self, value: float, resampled: Values, within: tuple[float, float]) -> Estimate:
        """Returns ``value`` with the percentile interval of ``resampled``, wider where documents are few.

        Resamples of n documents spread by sqrt((n - 1) / n) of what they should, and their spread is itself an
        estimate, for which Student's t stands with n - 1 degrees of freedom (Hesterberg, "What Teachers Should Know
        about the Bootstrap", arXiv 1411.5279). Without that, an interval over five documents holds the truth in
        84% of cases, one over two in half of them.
        """
        low, high = np.percentile(resampled, [2.5, 97.5])
        wider = students_t(self.documents - 1) / _NORMAL * math.sqrt(self.documents / (self.documents - 1))
        least, most = within
        return Estimate(
            value=round(value, 6),
            low=round(max(value - wider * max(value - float(low), 0.0), least), 6),
            high=round(min(value + wider * max(float(high) - value, 0.0), most), 6),
        )

    def _weights(self) -> Iterator[Values]:
        # How often each document is drawn in each resample: [some, documents], a bounded number at a time.
        generator = np.random.default_rng(self.seed)
        equal = np.full(self.documents, 1 / self.documents)
        at_once = max(1, NUMBERS_AT_ONCE // self.documents)
        for start in range(0, self.samples, at_once):
            size = min(at_once, self.samples - start)
            yield generator.multinomial(self.documents, equal, size=size).astype(np.float64)


def students_t(freedom: int) -> float:
    """Returns what 95% of Student's distribution with so many degrees of ``freedom`` lies within, to 0.1%."""
    # In the angle whose tangent is t / sqrt(freedom) its density is cos^(freedom - 1).
    angles = np.linspace(0, np.pi / 2, 2**16 + 1)
    density = np.cos(angles) ** (freedom - 1)
    below = np.cumsum(density[1:] + density[:-1])
    return float(math.sqrt(freedom) * np.tan(np.interp(0.95 * below[-1], below, angles[1:])))
