"""The section ``evaluate`` of ``params.yaml``."""

from pydantic import Field

from tasks.section import Section, operational


class EvaluateParams(Section):
    """How models are measured on the test split, and what they must reach."""

    seed: int = Field(ge=0)
    test_tokens: int = Field(default=1_000_000, ge=1)
    bootstrap_samples: int = Field(ge=100)
    max_relative_loss: float = Field(gt=0)
    max_regression: float = Field(gt=-1)
    max_bits_per_byte: float | None = Field(gt=0)
    ngram_order: int = Field(ge=2, le=8)
    threads: int = operational(ge=1)
