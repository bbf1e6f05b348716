"""The section ``collect`` of ``params.yaml``: the sources, which collecting copies from and ingesting reads."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.section import Section

# The codec, as pyarrow names it, that a file's last ending stands for.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Source(Section):
    """One place that text comes from, and how to read it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    # A file, a folder, a glob, or package://PACKAGE/PATH for a file inside an installed package.
    uri: str = Field(min_length=1)
    # Compressed files are recognized by a further .gz or .zst in their names.
    format: Literal["txt", "md", "jsonl", "csv", "parquet"]
    licence: str = Field(min_length=1)
    # For jsonl, csv and parquet: the field that holds the text.
    text_field: str | None = None
    # Consecutive records with equal values here are joined into one document. Empty: each record is a document.
    document_fields: list[str] = []
    # Documents with equal values here land in the same split. None: each document by itself.
    group_field: str | None = None

    @model_validator(mode="after")
    def _fields_fit_the_format(self) -> Self:
        tabular = self.format in ("jsonl", "csv", "parquet")
        if tabular and not self.text_field:
            raise ValueError(
                f"source '{self.name}': format {self.format} needs text_field; name the field with the text"
            )
        if not tabular and (self.text_field or self.document_fields or self.group_field):
            raise ValueError(
                f"source '{self.name}': format {self.format} has no fields; "
                "remove text_field, document_fields and group_field"
            )
        return self


class CollectParams(Section):
    """Where the text comes from."""

    sources: list[Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources share the name {', '.join(twice)}; give each its own")
        return self
