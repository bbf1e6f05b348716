"""Reads the texts of the corpus, a bounded batch at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks import paths
from tasks.errors import BadInput
from tasks.shards import SplitName

DOCUMENTS_PER_BATCH = 1024
_COLUMN = "text"
_MARK = "is_conversation"


def batches(split: SplitName) -> Iterator[tuple[list[str], list[bool]]]:
    """Yields the texts of ``split`` in batches of at most 1,024 documents (and of one row group), in order.

    With each batch it says which of them are conversations. Raises :class:`BadInput` when the split is missing or a
    file is damaged.
    """
    for file in _files(split):
        with _damage_is_told(file), pq.ParquetFile(file) as parquet:
            columns = [_COLUMN, *([_MARK] if _MARK in parquet.schema_arrow.names else [])]
            for group in range(parquet.num_row_groups):
                for batch in parquet.iter_batches(DOCUMENTS_PER_BATCH, row_groups=[group], columns=columns):
                    marks = batch.column(_MARK).to_pylist() if _MARK in columns else [False] * len(batch)
                    yield batch.column(_COLUMN).to_pylist(), marks


def has_conversations() -> bool:
    """Whether a source of the corpus holds conversations. Raises :class:`BadInput` as above."""
    file = _files("train")[0]
    with _damage_is_told(file):
        return _MARK in pq.read_schema(file).names


def texts(split: SplitName) -> Iterator[list[str]]:
    """Yields what :func:`batches` does, without the conversations."""
    for batch, marks in batches(split):
        yield [text for text, is_conversation in zip(batch, marks, strict=True) if not is_conversation]


def documents(split: SplitName) -> int:
    """Returns how many documents ``split`` holds, from the files' footers. Raises :class:`BadInput` as above."""
    count = 0
    for file in _files(split):
        with _damage_is_told(file):
            count += pq.read_metadata(file).num_rows
    return count


def _files(split: SplitName) -> list[Path]:
    folder = paths.CORPUS / split
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise BadInput(f"{folder}: no corpus. Run the stage 'ingest' first.")
    return files


@contextlib.contextmanager
def _damage_is_told(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"{file}: damaged or truncated ({reason}). Rerun 'ingest'.") from None
