"""``data/corpus/report.json``: where each record, character and byte went. What does not add up cannot be written."""

from typing import Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from tasks.ingest.record import Reason
from tasks.ingest.split import SplitName

MAX_NAMED_GROUPS = 200


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _in() -> Any:
    # "in" is a keyword of Python.
    return Field(validation_alias=AliasChoices("in", "in_"), serialization_alias="in", ge=0)


class Records(_Part):
    """Records of a source: in = kept + rejected, and rejected is the sum over the reasons."""

    in_: int = _in()
    kept: int = Field(ge=0)
    rejected: int = Field(ge=0)
    reasons: dict[Reason, int]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        _check("records", self.in_, self.kept + self.rejected)
        _check("reasons", self.rejected, sum(self.reasons.values()))
        return self


class Documents(_Part):
    """Documents that a source's kept records were joined into: in = out + duplicated."""

    in_: int = _in()
    out: int = Field(ge=0)
    duplicated: int = Field(ge=0)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        _check("documents", self.in_, self.out + self.duplicated)
        return self


class Amounts(_Part):
    """Characters or bytes: in = out + rejected + duplicated + normalized.

    ``in`` counts the text of kept records as it came and the whole raw record of rejected ones. ``normalized`` is what
    normalization took away, less what it and the newlines between joined records added: it may be negative.
    """

    in_: int = _in()
    out: int = Field(ge=0)
    rejected: int = Field(ge=0)
    duplicated: int = Field(ge=0)
    normalized: int

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        _check("amounts", self.in_, self.out + self.rejected + self.duplicated + self.normalized)
        return self


class SourceReport(_Part):
    """One source. ``sha256`` is that of the lines that ``sha256sum`` prints for its files, in order of their names.

    ``empty_files`` counts those of the ``files`` in which there is no record, neither kept nor rejected.
    """

    name: str
    licence: str
    format: str
    files: int
    empty_files: int
    sha256: str
    records: Records
    documents: Documents
    characters: Amounts
    bytes: Amounts


class SplitReport(_Part):
    """One split. A document without a group counts as a group; ``group_names`` is null where there are too many."""

    documents: int
    characters: int
    bytes: int
    groups: int
    group_names: list[str] | None


class CorpusReport(_Part):
    """The whole corpus: what came out of the sources is what lies in the splits."""

    sources: list[SourceReport]
    splits: dict[SplitName, SplitReport]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        splits = self.splits.values()
        _check("documents", sum(s.documents.out for s in self.sources), sum(s.documents for s in splits))
        _check("characters", sum(s.characters.out for s in self.sources), sum(s.characters for s in splits))
        _check("bytes", sum(s.bytes.out for s in self.sources), sum(s.bytes for s in splits))
        return self


def _check(what: str, left: int, right: int) -> None:
    if left != right:
        raise ValueError(f"{what} do not add up: {left} and {right}")
