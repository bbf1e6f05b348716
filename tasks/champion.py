"""The champion: the INT8 model that is promoted now, which a candidate is measured against.

``models/champion`` is an input that the flow brings and versions, as it does with ``data/raw``: ``champion.json`` says
which version lies there, and beside it lie the files of that version's INT8 model. Where nothing is promoted yet,
``champion.json`` says that and stands alone.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import paths
from tasks.errors import BadInput
from tasks.sources import FILE_FORMATS

# What scoring needs of an INT8 model; its audit and the curve of its fine-tuning stay with the version itself.
MODEL_FILES = ("model.onnx", "model.onnx.data", "config.json", "tokenizer.json")


class Grouping(BaseModel):
    """What keeps a source's documents in one split: the fields of ``collect.sources`` that say so."""

    model_config = ConfigDict(frozen=True)

    document_fields: tuple[str, ...] = ()
    group_field: str | None = None
    # Whether its texts grow in their split: files of txt and md do, and documents of several records without a group;
    # versions of old dealt these out by their whole text.
    grows_in_place: bool = False


class Split(BaseModel):
    """How text is dealt out to train, valid and test: ``ingest.split``, and the grouping of each source by its name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    valid: float
    test: float
    groups: dict[str, Grouping] = {}

    def deals_like(self, other: "Split") -> bool:
        """Whether both deal out alike what they have in common.

        No text of a source is in training for one and in test for the other then, but one that has left the group for
        whose sake it was in training, a record without a group that has changed, a file of txt or md that has another
        name, and that of a source with another name.
        """
        both = self.groups.keys() & other.groups.keys()
        shares = (self.seed, self.valid, self.test) == (other.seed, other.valid, other.test)
        return shares and all(self.groups[name] == other.groups[name] for name in both)


def split_of(params: object, grows_in_place: bool = True) -> Split | None:
    """Returns how a whole ``params.yaml`` deals text out; None where it does not say, or in terms of another time.

    ``grows_in_place``: whether the code that reads it leaves texts that grow in their split, as this code does.
    """
    try:
        read = _Params.model_validate(params)
        groups = {source.name: source.grouping(grows_in_place) for source in read.collect.sources}
        return Split(**read.ingest.split, groups=groups)
    except (TypeError, ValidationError):
        return None


class _Source(BaseModel):
    name: str
    format: str = ""
    document_fields: tuple[str, ...] = ()
    group_field: str | None = None

    def grouping(self, grows_in_place: bool) -> Grouping:
        grows = self.format in FILE_FORMATS or (bool(self.document_fields) and self.group_field is None)
        return Grouping(
            document_fields=self.document_fields,
            group_field=self.group_field,
            grows_in_place=grows_in_place and grows,
        )


class _Collect(BaseModel):
    sources: list[_Source]


class _Ingest(BaseModel):
    split: dict[str, Any]


class _Params(BaseModel):
    collect: _Collect
    ingest: _Ingest


class Champion(BaseModel):
    """``champion.json``: the promoted version's tag (``lm@v1.2.0``) and commit; None where nothing is promoted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str | None = None
    commit: str | None = None
    # None where that version's parameters do not say.
    split: Split | None = None


def read(path: Path = paths.CHAMPION) -> Champion:
    """Returns which champion lies in the folder ``path``. Raises :class:`BadInput` where nothing says so."""
    record = path / paths.CHAMPION_RECORD.name
    try:
        return Champion.model_validate_json(record.read_bytes())
    except FileNotFoundError:
        raise BadInput(
            f"{record}: no such file. `overnight run` brings the champion there. Without Git and DVC, write {{}} into "
            "that file: no champion yet."
        ) from None
    except ValidationError as error:
        raise BadInput(
            f"{record}: not a record of a champion ({error.error_count()} faults). Remove {path} and {path}.dvc; "
            "`overnight run` brings it anew."
        ) from None
