"""Intervals from resampling documents: the unit that varies is the document, not the token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

NUMBERS_AT_ONCE = 2**22
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

    def ratio(self, numerators: Values, denominators: Values, scale: float = 1.0) -> Estimate:
        """Returns ``scale`` x sum(numerators) / sum(denominators), both [documents], with its percentile interval.

        Both are taken from the same resample, so that a difference between two models over their shared documents is
        paired (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section 4).
        """
        value = round(scale * numerators.sum() / denominators.sum(), 6)
        if self.documents == 1:
            # Every resample would be that document again: an interval of no width, which claims certainty.
            return Estimate(value=value, low=None, high=None)
        resampled = np.concatenate(
            [scale * (weights @ numerators) / (weights @ denominators) for weights in self._weights()]
        )
        low, high = np.percentile(resampled, [2.5, 97.5])
        return Estimate(value=value, low=round(float(low), 6), high=round(float(high), 6))

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

        value = round(found(np.ones(len(values))), 6)
        if self.documents == 1:
            return Estimate(value=value, low=None, high=None)
        resampled = [found(weights) for some in self._weights() for weights in some]
        low, high = np.percentile(resampled, [2.5, 97.5])
        return Estimate(value=value, low=round(float(low), 6), high=round(float(high), 6))

    def _weights(self) -> Iterator[Values]:
        # How often each document is drawn in each resample: [some, documents], a bounded number at a time.
        generator = np.random.default_rng(self.seed)
        equal = np.full(self.documents, 1 / self.documents)
        at_once = max(1, NUMBERS_AT_ONCE // self.documents)
        for start in range(0, self.samples, at_once):
            size = min(at_once, self.samples - start)
            yield generator.multinomial(self.documents, equal, size=size).astype(np.float64)
