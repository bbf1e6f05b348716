"""The section ``ingest`` of ``params.yaml``."""

from typing import Self

from pydantic import Field, model_validator

from tasks.section import Section


class Split(Section):
    """How groups are dealt out to train, valid and test."""

    seed: int = Field(ge=0)
    valid: float = Field(gt=0, lt=1)
    test: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if self.valid + self.test >= 1:
            raise ValueError(f"valid {self.valid} + test {self.test} leave nothing to train on; lower one of them")
        return self


class IngestParams(Section):
    """What counts as a valid record, and how documents are split."""

    max_line_bytes: int = Field(ge=1)
    max_reject_rate: float = Field(ge=0, le=1)
    split: Split
