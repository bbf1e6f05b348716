"""What readers yield: a record whose text is fit for the corpus, or a rejection that says why there is none."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import xxhash

from tasks.ingest.normalize import normalize

Reason = Literal[
    "malformed JSON",
    "malformed CSV",
    "missing field",
    "wrong type",
    "not UTF-8",
    "line too long",
    "empty text",
    "malformed conversation",
]
REASONS: tuple[Reason, ...] = get_args(Reason)

_FIELDS_TOLD = 8
_LONGEST_NAME = 40
_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


@dataclass(frozen=True, slots=True)
class Size:
    """An amount of text."""

    characters: int
    bytes: int

    def __add__(self, other: "Size") -> "Size":
        return Size(self.characters + other.characters, self.bytes + other.bytes)

    def __sub__(self, other: "Size") -> "Size":
        return Size(self.characters - other.characters, self.bytes - other.bytes)


NOTHING = Size(0, 0)


@dataclass(frozen=True, slots=True)
class Record:
    """One text of a file. ``line`` counts from 1: the line where it begins, or the row of a Parquet file.

    ``text`` is normalized and not blank; ``size`` is that of the text as it came. ``document`` holds the values of the
    source's document fields, as text; ``group`` that of the group field.
    """

    line: int
    text: str
    document: tuple[str, ...]
    group: str | None
    size: Size


@dataclass(frozen=True, slots=True)
class Rejection:
    """A record that cannot be used. ``size`` and ``digest`` (XXH3, 128 bits, hexadecimal) describe its raw bytes.

    ``detail`` says more than the reason does: which field is missing, and which are there. Never any of the text.
    """

    line: int
    reason: Reason
    digest: str
    size: Size
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Fields:
    """Which fields of a record matter: that of the text, those that make a document, that of the group.

    Where ``holds_messages``, that of the text holds a conversation.
    """

    text: str
    document: tuple[str, ...]
    group: str | None
    holds_messages: bool = False

    @property
    def all(self) -> tuple[str, ...]:
        """Each field's name once, the text first."""
        return tuple(dict.fromkeys((self.text, *self.labels)))

    @property
    def labels(self) -> tuple[str, ...]:
        """The document fields and then the group field, which may repeat one of them."""
        return self.document if self.group is None else (*self.document, self.group)


def accept(line: int, text: str, labels: tuple[str, ...], fields: Fields, raw: bytes) -> Record | Rejection:
    """Returns the record of ``text``, or a rejection of ``raw`` when nothing is left of the text after normalizing.

    ``labels`` are the values of ``fields.labels``.
    """
    normalized = normalize(text)
    if not normalized or normalized.isspace():
        return reject(line, "empty text", raw)
    document, group = (labels, None) if fields.group is None else (labels[:-1], labels[-1])
    return Record(line, normalized, document, group, size_of(text))


def reject(line: int, reason: Reason, raw: bytes, detail: str = "") -> Rejection:
    """Returns the rejection of ``raw``; of bytes that are not UTF-8, each faulty sequence counts as a character."""
    size = Size(len(raw.decode(errors="replace")), len(raw))
    return Rejection(line, reason, xxhash.xxh3_128_hexdigest(raw), size, detail)


def missing(wanted: str, present: Iterable[str]) -> str:
    """Returns the detail of a record without the field ``wanted`` that has those in ``present``."""
    names = list(present)
    return f"{_quoted(wanted)} is null" if wanted in names else f"no {_quoted(wanted)}; it has {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """Returns the first of ``names``, in quotes, and how many more there are; whatever they hold, it is one line."""
    more = f" and {len(names) - _FIELDS_TOLD:,} more" if len(names) > _FIELDS_TOLD else ""
    return (", ".join(map(_quoted, names[:_FIELDS_TOLD])) or "no field") + more


def mistyped(wanted: str, value: object) -> str:
    """Returns the detail of a record whose field ``wanted`` holds ``value``, which is of no use there."""
    return f"{_quoted(wanted)} is {_KINDS.get(type(value), type(value).__name__)}"


def _quoted(name: str) -> str:
    return repr(name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…")


def size_of(text: str) -> Size:
    """Returns the characters and the UTF-8 bytes of ``text``."""
    return Size(len(text), len(text) if text.isascii() else len(text.encode()))


def label(value: object) -> str | None:
    """Returns a document or group field's value as text, an integer in decimal; None for a value of another type."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None
