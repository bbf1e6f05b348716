"""The section ``collect`` of ``params.yaml``: the sources, which collecting copies from and ingesting reads."""

import re
from pathlib import PurePath
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from tasks.section import Section

# The codec, as pyarrow names it, that a file's last ending stands for.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
Format = Literal["txt", "md", "jsonl", "csv", "parquet"]
# Of these each file is one text.
FILE_FORMATS = ("txt", "md")
# Control characters, line separators, and the bytes of a name that is not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_LONGEST_NAME = 100
_NAME = re.compile(rf"[a-z0-9][a-z0-9_-]{{0,{_LONGEST_NAME - 1}}}")
_EXAMPLE = "- {name: notes, uri: texts, format: txt, licence: CC0-1.0} for the .txt files in the folder texts"


class Source(Section):
    """One place that text comes from, and how to read it."""

    # The folder in data/raw, on every file system.
    name: str
    # A file, a folder, a glob, or package://PACKAGE/PATH for a file inside an installed package.
    uri: str = Field(min_length=1)
    # Compressed files are recognized by a further .gz or .zst in their names.
    format: Format
    licence: str = Field(min_length=1)
    # For jsonl, csv and parquet: the field that holds the text.
    text_field: str | None = None
    # For jsonl, instead: the field that holds a conversation, a list of {role, content}. The answers alone are learned.
    messages_field: str | None = None
    # Consecutive records with equal values here are joined into one document. Empty: each record is a document.
    document_fields: list[str] = []
    # Documents with equal values here land in the same split. None: each by itself, by its first record.
    group_field: str | None = None

    @property
    def holds_files(self) -> bool:
        """Whether each file is one text, and its name the text's group."""
        return self.format in FILE_FORMATS

    @field_validator("name")
    @classmethod
    def _name_is_that_of_a_folder(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"the name {name!r} cannot be that of a folder in data/raw; use up to {_LONGEST_NAME} lowercase "
                "letters, digits, - and _, a letter or digit first, such as my-notes"
            )
        return name

    @field_validator("uri")
    @classmethod
    def _uri_is_one_line(cls, uri: str) -> str:
        if UNPRINTABLE.search(uri):
            raise ValueError(
                f"{uri!r} holds a line break or another control character; name a file, a folder or a glob"
            )
        return uri

    @model_validator(mode="after")
    def _fields_fit_the_format(self) -> Self:
        if self.messages_field:
            if self.format != "jsonl" or self.text_field or self.document_fields:
                raise ValueError(
                    f"source '{self.name}': messages_field is for format jsonl, without text_field or document_fields; "
                    "remove those: a conversation is a document by itself"
                )
            return self
        if not self.holds_files and not self.text_field:
            raise ValueError(
                f"source '{self.name}': format {self.format} needs text_field; name the field with the text"
            )
        if self.holds_files and (self.text_field or self.document_fields or self.group_field):
            raise ValueError(
                f"source '{self.name}': format {self.format} has no fields; "
                "remove text_field, document_fields and group_field"
            )
        return self


class CollectParams(Section):
    """Where the text comes from."""

    sources: list[Source]

    @field_validator("sources", mode="before")
    @classmethod
    def _there_is_a_source(cls, sources: object) -> object:
        if sources is None or sources == []:
            raise ValueError(f"no source is left; name at least one place that text comes from, for example {_EXAMPLE}")
        return sources

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources share the name {', '.join(twice)}; give each its own")
        return self


def has_ending(name: str, format_: str) -> bool:
    """Whether a file of this ``name`` is one of the format, compressed or not."""
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return name.endswith(f".{format_}")


def printable(name: PurePath | str) -> str:
    """Returns ``name`` in one line that can be written as UTF-8, whatever it holds: line breaks, bytes of no text."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(name))
