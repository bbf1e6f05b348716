"""Comma-separated values with a header line. Quoted fields may contain newlines; blank lines are no records.

pyarrow parses a block at a time, when each of its lines is one record. Otherwise the records of the block are read one
by one through the ``csv`` module, which reads on into the next block until the last record is complete.
"""

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv

from tasks.errors import BadInput
from tasks.ingest.lines import Block
from tasks.ingest.record import Fields, Reason, Record, Rejection, accept, listed, reject

# The csv module's own limit of 128 KiB a field is below the one that params.yaml sets for a whole record.
csv.field_size_limit(2**31 - 1)

# Fields without quotes, or quoted as RFC 4180 has it. pyarrow reads on where a quoted field goes on after its closing
# quote; the csv module, when strict, takes that for the stray quote it usually is.
_WELL_QUOTED = re.compile(rb'(?:(?:[^",\r\n]*+|"(?:[^"]++|"")*+")[,\r\n])*+')

_Lines = deque[tuple[int, bytes]]


def read_csv(
    pieces: Iterable[Block | Rejection], fields: Fields, max_record_bytes: int, name: str
) -> Iterator[Record | Rejection]:
    """Yields a record or a rejection for each record of ``pieces`` after the header, in the order of the file.

    A record that is longer than ``max_record_bytes``, or whose quotes do not close where a field ends, is given up
    after its first line, so that a stray quote does not swallow what follows. Raises :class:`BadInput` that names the
    file ``name`` when the header lacks a field.
    """
    source = _Pieces(iter(pieces))
    header = _read_header(source, fields, max_record_bytes, name)
    if header is None:
        return
    while (piece := source.next()) is not None:
        if isinstance(piece, Rejection):
            yield piece
            continue
        table = _parse(piece, header)
        if table is None:
            yield from _record_by_record(piece, source, header, max_record_bytes)
        else:
            yield from _rows(piece, table, header)


@dataclass(frozen=True)
class _Header:
    """How many columns there are, and which of them hold the text and ``fields.labels``."""

    fields: Fields
    columns: int
    text: int
    labels: tuple[int, ...]


class _Pieces:
    """The pieces of a file, of which one that was read too early can be put back."""

    def __init__(self, pieces: Iterator[Block | Rejection]) -> None:
        self._pieces = pieces
        self._put_back: list[Block | Rejection] = []

    def next(self) -> Block | Rejection | None:
        return self._put_back.pop() if self._put_back else next(self._pieces, None)

    def put_back(self, piece: Block | Rejection) -> None:
        self._put_back.append(piece)

    def put_back_lines(self, lines: _Lines) -> None:
        if lines:
            self.put_back(Block(lines[0][0], b"".join(line + b"\n" for _, line in lines)))


def _read_header(source: _Pieces, fields: Fields, max_record_bytes: int, name: str) -> _Header | None:
    names: list[str] = []
    while not names:
        piece = source.next()
        if piece is None:
            return None
        if isinstance(piece, Rejection):
            raise BadInput(f"{name}: line {piece.line}: the header is unreadable ({piece.reason}). Mend the file.")
        lines = deque(piece.lines())
        record = _take_record(lines, source, max_record_bytes)
        if record.fault:
            raise BadInput(f"{name}: line {record.line}: the header is unreadable ({record.fault}). Mend the file.")
        source.put_back_lines(lines)
        names = record.values
    for wanted in fields.all:
        if (count := names.count(wanted)) != 1:
            raise BadInput(
                f"{name}: {count or 'no'} columns are named '{wanted}'; the header has {listed(names)}. "
                "Name the right field in the source in params.yaml."
            )
    return _Header(fields, len(names), names.index(fields.text), tuple(names.index(label) for label in fields.labels))


@dataclass(frozen=True)
class _RawRecord:
    """A record before it is judged: its first line, its bytes, and its values or what is wrong with it."""

    line: int
    data: bytes
    values: list[str]
    fault: Reason | None


def _record_by_record(
    block: Block, source: _Pieces, header: _Header, max_record_bytes: int
) -> Iterator[Record | Rejection]:
    lines = deque(block.lines())
    after = block.first_line + len(block)
    while lines and lines[0][0] < after:
        raw = _take_record(lines, source, max_record_bytes)
        if raw.fault:
            yield reject(raw.line, raw.fault, raw.data)
        elif raw.values:
            yield _judge(raw, header)
    source.put_back_lines(lines)


def _judge(raw: _RawRecord, header: _Header) -> Record | Rejection:
    if len(raw.values) != header.columns:
        detail = f"{len(raw.values):,} fields, and the header has {header.columns:,}"
        return reject(raw.line, "malformed CSV", raw.data, detail)
    labels = tuple(raw.values[column] for column in header.labels)
    return accept(raw.line, raw.values[header.text], labels, header.fields, raw.data)


def _take_record(lines: _Lines, source: _Pieces, max_record_bytes: int) -> _RawRecord:
    """Takes the lines of the next record from ``lines``, which is not empty and grows from ``source`` as needed."""
    taken: _Lines = deque()
    complete = True

    def supply() -> Iterator[str]:
        nonlocal complete
        size = -1
        while lines or _refill(lines, source):
            size += len(lines[0][1]) + 1
            if size > max_record_bytes:
                break
            taken.append(lines.popleft())
            yield taken[-1][1].decode(errors="surrogateescape") + "\n"
        complete = False

    try:
        values = next(csv.reader(supply(), strict=True))
    except csv.Error:
        values, complete = [], False
    if not complete:
        while len(taken) > 1:
            lines.appendleft(taken.pop())
    data = b"\n".join(line for _, line in taken)
    return _RawRecord(taken[0][0], data, values, _fault(data, complete))


def _refill(lines: _Lines, source: _Pieces) -> bool:
    """Appends the next block's lines; returns False at the end of the file and before a line over the limit."""
    piece = source.next()
    if piece is None:
        return False
    if isinstance(piece, Rejection):
        source.put_back(piece)
        return False
    lines.extend(piece.lines())
    return True


def _fault(data: bytes, complete: bool) -> Reason | None:
    try:
        data.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return None if complete else "malformed CSV"


def _parse(block: Block, header: _Header) -> pa.Table | None:
    """Returns one row a line of ``block``; None when the block has to go record by record."""
    if b"\0" in block.data or block.data.count(b"\r") != block.data.count(b"\r\n"):
        return None
    if b'"' in block.data and not _WELL_QUOTED.fullmatch(block.data):
        return None
    # pyarrow closes a quote that is open at the end; this row is then swallowed by it and missing from the count.
    sentinel = b",".join([b"."] * header.columns) + b"\n"
    names = [str(column) for column in range(header.columns)]
    wanted = list(dict.fromkeys(names[column] for column in (header.text, *header.labels)))
    try:
        block.data.decode()
        table = pyarrow.csv.read_csv(
            pa.BufferReader(block.data + sentinel),
            read_options=pyarrow.csv.ReadOptions(
                column_names=names, block_size=len(block.data) + len(sentinel) + 1, use_threads=False
            ),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string())
            ),
        )
    except (UnicodeDecodeError, pa.ArrowInvalid):
        return None
    return table.slice(0, len(block)) if len(table) == len(block) + 1 else None


def _rows(block: Block, table: pa.Table, header: _Header) -> Iterator[Record | Rejection]:
    texts = table.column(str(header.text)).to_pylist()
    labels = [table.column(str(column)).to_pylist() for column in header.labels]
    for index, text in enumerate(texts):
        values = tuple(column[index] for column in labels)
        yield accept(block.first_line + index, text, values, header.fields, block.line(index))
