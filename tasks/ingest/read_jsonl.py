"""JSON lines: one object a line. Blank lines are no records.

pyarrow parses a block at a time. What it does with a line must be what the line path does; where one cannot be sure
of that without looking, or where a record is invalid, the whole block goes line by line through the ``json`` module.
"""

import json
import re
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.json

from tasks.ingest import conversation
from tasks.ingest.lines import Block
from tasks.ingest.record import Fields, Record, Rejection, accept, label, missing, mistyped, reject

_BLANK = b" \t\r"
# Beyond these `json` gives up (int's limit of digits, the recursion limit) where pyarrow does not.
_MAX_DIGITS = 4300
_MANY_BRACKETS = 400
# rapidjson takes "Inf" for a number, `json` only "Infinity".
_INF = re.compile(rb"Inf(?!inity)")


def read_jsonl(pieces: Iterable[Block | Rejection], fields: Fields) -> Iterator[Record | Rejection]:
    """Yields a record or a rejection for each line of ``pieces`` that is not blank, in the order of the file."""
    for piece in pieces:
        if isinstance(piece, Rejection):
            yield piece
            continue
        table = _parse(piece, fields)
        if table is None:
            yield from _line_by_line(piece, fields)
        else:
            yield from _rows(piece, table, fields)


def _line_by_line(block: Block, fields: Fields) -> Iterator[Record | Rejection]:
    for number, line in block.lines():
        if line.strip(_BLANK):
            yield _read_line(number, line, fields)


def _read_line(number: int, line: bytes, fields: Fields) -> Record | Rejection:
    try:
        values = json.loads(line.decode(), parse_int=_integer)
    except UnicodeDecodeError:
        return reject(number, "not UTF-8", line)
    except json.JSONDecodeError as error:
        return reject(number, "malformed JSON", line, f"{error.msg.removesuffix(' at')} at column {error.colno:,}")
    except (ValueError, RecursionError):
        return reject(number, "malformed JSON", line)
    if not isinstance(values, dict):
        return reject(number, "wrong type", line, "the line is no object in braces")
    for name in fields.all:
        if values.get(name) is None:
            return reject(number, "missing field", line, missing(name, values))
    text = values[fields.text]
    if fields.holds_messages:
        try:
            text = conversation.as_text(text)
        except ValueError as error:
            return reject(number, "malformed conversation", line, str(error))
    if not isinstance(text, str):
        return reject(number, "wrong type", line, mistyped(fields.text, text))
    labels: list[str] = []
    for name in fields.labels:
        value = label(values[name])
        if value is None:
            return reject(number, "wrong type", line, mistyped(name, values[name]))
        labels.append(value)
    try:
        "".join((text, *labels)).encode()
    except UnicodeEncodeError:
        # An escaped half of a surrogate pair, which no encoding of Unicode can write.
        return reject(number, "malformed JSON", line)
    return accept(number, text, tuple(labels), fields, line)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _parse(block: Block, fields: Fields) -> pa.Table | None:
    """Returns one row a line of ``block``; None when the block has to go line by line."""
    if fields.holds_messages or not _is_plain(block):
        return None
    schema = _schema(block.line(0), fields)
    if schema is None:
        return None
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block.data),
            # One chunk: pyarrow cuts at carriage returns too.
            read_options=pyarrow.json.ReadOptions(block_size=len(block.data) + 1, use_threads=False),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        table.validate(full=True)
    except pa.ArrowInvalid:
        return None
    if len(table) != len(block) or any(column.null_count for column in table.columns):
        return None
    return table


def _is_plain(block: Block) -> bool:
    """Whether each line is between braces (so that as many rows as lines mean one a line) and free of oddities."""
    data = np.frombuffer(block.data, dtype=np.uint8)
    last = data[np.maximum(block.ends - 1, block.starts)]
    before_last = data[np.maximum(block.ends - 2, block.starts)]
    closed = (last == ord("}")) | ((last == ord("\r")) & (before_last == ord("}")))
    if not closed.all() or not (data[block.starts] == ord("{")).all():
        return False
    if b"\0" in block.data or _INF.search(block.data):
        return False
    # `[` and `{` differ in one bit: 0x5b and 0x7b.
    brackets = np.add.reduceat((data | 0x20) == ord("{"), block.starts, dtype=np.int64)
    if brackets.max() > _MANY_BRACKETS:
        return False
    try:
        block.data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _schema(first: bytes, fields: Fields) -> pa.Schema | None:
    """Returns the columns' types as the block's first line has them: text fields are never taken for times."""
    try:
        values = json.loads(first, parse_int=_integer)
    except (ValueError, RecursionError):
        return None
    types: dict[str, pa.DataType] = {}
    for name in fields.all:
        value = values.get(name)
        if isinstance(value, str):
            types[name] = pa.string()
        elif isinstance(value, int) and not isinstance(value, bool) and name != fields.text:
            types[name] = pa.int64()
        else:
            return None
    return pa.schema(types)


def _rows(block: Block, table: pa.Table, fields: Fields) -> Iterator[Record | Rejection]:
    texts = table.column(fields.text).to_pylist()
    labels = [[str(value) for value in table.column(name).to_pylist()] for name in fields.labels]
    for index, text in enumerate(texts):
        values = tuple(column[index] for column in labels)
        yield accept(block.first_line + index, text, values, fields, block.line(index))
