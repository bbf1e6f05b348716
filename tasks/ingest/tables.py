"""The Parquet files of the corpus, written row group by row group so that memory stays bounded."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BYTES_PER_ROW_GROUP = 2**23
BYTES_PER_PART = 2**27

CORPUS_SCHEMA = pa.schema(
    {name: pa.field(name, pa.string(), nullable=name == "group") for name in ("text", "source", "group", "id")}.values()
)
# Where a source holds conversations: whether this text is one, as :mod:`tasks.ingest.conversation` writes it.
CHAT_SCHEMA = CORPUS_SCHEMA.append(pa.field("is_conversation", pa.bool_(), nullable=False))
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)

Row = tuple[str | int | bool | None, ...]


def read_rows(folder: Path) -> Iterator[tuple[Any, ...]]:
    """Yields the rows of the files in ``folder`` in the order in which they were written, a row group at a time."""
    for part in sorted(folder.iterdir()):
        with pq.ParquetFile(part) as table:
            for group in range(table.num_row_groups):
                columns = table.read_row_group(group).columns
                yield from zip(*(column.to_pylist() for column in columns), strict=True)


class TableWriter(AbstractContextManager["TableWriter"]):
    """Writes rows of ``schema`` to the files that ``parts`` names, going on to the next after ``BYTES_PER_PART``."""

    def __init__(self, parts: Iterator[Path], schema: pa.Schema) -> None:
        self._parts = parts
        self._schema = schema
        self._writer: pq.ParquetWriter | None = None
        self._sink: pa.NativeFile | None = None
        self._rows: list[Row] = []
        self._bytes_of_rows = 0
        self._bytes_of_part = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None or not issubclass(kind, OSError):
                # Also when nothing was written: an empty table is not the same as a missing one.
                self._flush()
        finally:
            self._close_part()

    def write(self, row: Row, size: int) -> None:
        """Adds ``row`` of about ``size`` bytes."""
        self._rows.append(row)
        self._bytes_of_rows += size
        if self._bytes_of_rows >= BYTES_PER_ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._writer is not None and self._bytes_of_part >= BYTES_PER_PART:
            self._close_part()
        if self._writer is None:
            self._sink = pa.OSFile(str(next(self._parts)), "wb")
            self._writer = pq.ParquetWriter(self._sink, self._schema, compression="zstd")
        if self._rows:
            columns = [
                pa.array(values, type=field.type)
                for field, values in zip(self._schema, zip(*self._rows, strict=True), strict=True)
            ]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._bytes_of_part += self._bytes_of_rows
        self._rows, self._bytes_of_rows = [], 0

    def _close_part(self) -> None:
        if self._writer is None or self._sink is None:
            return
        try:
            self._writer.close()
        finally:
            # On a full disk the writer's own close fails before it closes the file, and it would try again when it is
            # collected, to print what cannot be caught.
            self._writer.is_open = False
            self._sink.close()
            self._writer, self._sink, self._bytes_of_part = None, None, 0
