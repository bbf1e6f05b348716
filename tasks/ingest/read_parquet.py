"""Parquet: one row is one record; its line is its row, counted from 1."""

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.errors import BadInput
from tasks.ingest.record import Fields, Record, Rejection, accept, label, listed, missing, reject

# A value may lie in a file once and be that of every row, so few are decoded at a time.
ROWS_PER_BATCH = 64
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def read_parquet(file: BinaryIO, fields: Fields, max_text_bytes: int, name: str) -> Iterator[Record | Rejection]:
    """Yields a record or a rejection for each row, in the order of the file.

    Raises :class:`BadInput` that names the file ``name`` when a column is missing or of a type that is no text (for
    document and group fields: no text and no integer).
    """
    parquet = pq.ParquetFile(file)
    _check_columns(parquet.schema_arrow, fields, name)
    row = 1
    for batch in parquet.iter_batches(ROWS_PER_BATCH, columns=list(fields.all)):
        # As bytes, because pyarrow does not check that a column of strings is UTF-8.
        texts = _plain(batch.column(fields.text)).cast(pa.large_binary()).to_pylist()
        labels = [_labels(batch.column(column)) for column in fields.labels]
        for index, raw in enumerate(texts):
            yield _judge(row + index, raw, tuple(column[index] for column in labels), fields, max_text_bytes)
        row += len(texts)


def _judge(
    row: int, raw: bytes | None, labels: tuple[bytes | None, ...], fields: Fields, max_text_bytes: int
) -> Record | Rejection:
    if raw is None:
        return reject(row, "missing field", b"", missing(fields.text, fields.all))
    present: list[bytes] = []
    for name, value in zip(fields.labels, labels, strict=True):
        if value is None:
            return reject(row, "missing field", raw, missing(name, fields.all))
        present.append(value)
    if len(raw) > max_text_bytes:
        return reject(row, "line too long", raw, f"{len(raw):,} bytes")
    try:
        return accept(row, raw.decode(), tuple(value.decode() for value in present), fields, raw)
    except UnicodeDecodeError:
        return reject(row, "not UTF-8", raw)


def _labels(column: pa.Array) -> list[bytes | None]:
    plain = _plain(column)
    if pa.types.is_integer(plain.type):
        return [None if value is None else str(label(value)).encode() for value in plain.to_pylist()]
    values: list[bytes | None] = plain.cast(pa.large_binary()).to_pylist()
    return values


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _check_columns(schema: pa.Schema, fields: Fields, name: str) -> None:
    for wanted in fields.all:
        if (count := schema.names.count(wanted)) != 1:
            raise BadInput(
                f"{name}: {count or 'no'} columns are named '{wanted}'; the file has {listed(schema.names)}. "
                "Name the right field in the source in params.yaml."
            )
        type_ = schema.field(wanted).type
        if pa.types.is_dictionary(type_):
            type_ = type_.value_type
        is_text = any(check(type_) for check in _TEXT)
        if not (is_text or (pa.types.is_integer(type_) and wanted != fields.text)):
            raise BadInput(
                f"{name}: the column '{wanted}' holds {type_}, and text is needed. "
                "Name another field in the source in params.yaml, or write the column as strings."
            )
