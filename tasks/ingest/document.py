"""From records to documents."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import xxhash

from tasks.ingest.record import Record

SEPARATOR = "\n"


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus, which begins with that of its ``first`` record, in ``line``; ``records`` were joined."""

    text: str
    group: str | None
    line: int
    records: int
    first: str


def digest(text: str) -> bytes:
    """Returns the 128-bit XXH3 digest of ``text``: equal for exact duplicates."""
    return xxhash.xxh3_128_digest(text.encode())


def join(records: Iterable[Record]) -> Iterator[Document]:
    """Yields the documents of one file: consecutive records with equal document fields (and group), joined by newlines.

    A record without document fields is a document by itself.
    """
    for (labels, group), alike in groupby(records, key=lambda record: (record.document, record.group)):
        if not labels:
            for record in alike:
                yield Document(record.text, group, record.line, 1, record.text)
            continue
        joined = list(alike)
        text, first = SEPARATOR.join(record.text for record in joined), joined[0]
        yield Document(text, group, first.line, len(joined), first.text)
