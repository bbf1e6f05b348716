"""Intervals from resampling documents: the unit that varies is the document, not the token."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Values = npt.NDArray[np.float64]


class Estimate(BaseModel):
    """A number with its 95% interval."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float


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
        weights = self._weights()
        resampled = scale * (weights @ numerators) / (weights @ denominators)
        low, high = np.percentile(resampled, [2.5, 97.5])
        value = scale * numerators.sum() / denominators.sum()
        return Estimate(value=round(value, 6), low=round(float(low), 6), high=round(float(high), 6))

    def _weights(self) -> Values:
        # How often each document is drawn in each resample: [samples, documents].
        generator = np.random.default_rng(self.seed)
        equal = np.full(self.documents, 1 / self.documents)
        return generator.multinomial(self.documents, equal, size=self.samples).astype(np.float64)
