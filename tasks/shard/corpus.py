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


def batches(split: SplitName) -> Iterator[list[str]]:
    """Yields the texts of ``split`` in batches of at most 1,024 documents (and of one row group), in order.

    Raises :class:`BadInput` when the split is missing or a file is damaged.
    """
    for file in _files(split):
        with _damage_is_told(file), pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                for batch in parquet.iter_batches(DOCUMENTS_PER_BATCH, row_groups=[group], columns=[_COLUMN]):
                    yield batch.column(_COLUMN).to_pylist()


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
