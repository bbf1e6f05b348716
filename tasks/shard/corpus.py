"""Reads the texts of the corpus, a bounded batch at a time."""

from collections.abc import Iterator

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
    folder = paths.CORPUS / split
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise BadInput(f"{folder}: no corpus. Run the stage 'ingest' first.")
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                for group in range(parquet.num_row_groups):
                    for batch in parquet.iter_batches(DOCUMENTS_PER_BATCH, row_groups=[group], columns=[_COLUMN]):
                        yield batch.column(_COLUMN).to_pylist()
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise BadInput(f"{file}: damaged or truncated ({reason}). Rerun 'ingest'.") from None


def documents(split: SplitName) -> int:
    """Returns how many documents ``split`` holds, from the files' footers."""
    return sum(pq.read_metadata(file).num_rows for file in (paths.CORPUS / split).glob("*.parquet"))
