"""From a file and its source to records: decompression, and the reader of the source's format."""

import codecs
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.atomic import disk_full_is_told
from tasks.errors import BadInput
from tasks.ingest.lines import BLOCK_BYTES, Readable, cut
from tasks.ingest.read_csv import read_csv
from tasks.ingest.read_jsonl import read_jsonl
from tasks.ingest.read_parquet import read_parquet
from tasks.ingest.read_text import read_text
from tasks.ingest.record import Fields, Record, Rejection
from tasks.sources import COMPRESSIONS, Source


class FileReader:
    """Reads the records of one file of a source."""

    def __init__(self, path: Path, source: Source, max_line_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self._path = path
        self._source = source
        self._max_line_bytes = max_line_bytes
        self._block_bytes = block_bytes
        self._raw = pa.OSFile(str(path))
        self._size = self._raw.size()

    @property
    def position(self) -> int:
        """Bytes of the file, as it lies on disk, that have been read."""
        return self._size if self._raw.closed else int(self._raw.tell())

    def __iter__(self) -> Iterator[Record | Rejection]:
        """Yields each record or its rejection. Raises :class:`BadInput` that names a damaged or truncated file."""
        try:
            with self._raw:
                yield from self._records()
        except (pa.ArrowException, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise BadInput(
                f"{self._path}: damaged, truncated or not what its name says ({reason}). "
                "Mend it at its source, or delete it there and here."
            ) from None

    def _records(self) -> Iterator[Record | Rejection]:
        if self._size == 0:
            # No valid Parquet, gzip or Zstandard file, and yet no damaged one.
            return iter(())
        source, limit, name = self._source, self._max_line_bytes, str(self._path)
        if source.holds_files:
            return read_text(_WithoutMark(self._stream()), limit, self._block_bytes)
        field = source.messages_field or source.text_field
        assert field is not None  # Source refuses a tabular format without it.
        fields = Fields(field, tuple(source.document_fields), source.group_field, bool(source.messages_field))
        if source.format == "parquet":
            return self._parquet(fields)
        pieces = cut(_WithoutMark(self._stream()), limit, self._block_bytes)
        if source.format == "csv":
            return read_csv(pieces, fields, limit, name)
        return read_jsonl(pieces, fields)

    def _parquet(self, fields: Fields) -> Iterator[Record | Rejection]:
        stream = self._stream()
        if stream is self._raw:
            yield from read_parquet(self._raw, fields, self._max_line_bytes, str(self._path))
            return
        # A Parquet file is read from its end, which a compressed stream cannot do.
        with tempfile.TemporaryFile() as whole:
            with disk_full_is_told(Path(tempfile.gettempdir())):
                shutil.copyfileobj(stream, whole, BLOCK_BYTES)
            whole.seek(0)
            yield from read_parquet(whole, fields, self._max_line_bytes, str(self._path))

    def _stream(self) -> Any:
        codec = COMPRESSIONS.get(self._path.suffix)
        return pa.CompressedInputStream(self._raw, codec) if codec else self._raw


class _WithoutMark:
    """A stream of bytes without the byte-order mark that some programs put before UTF-8."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._at_start = True

    def read(self, nbytes: int, /) -> bytes:
        if not self._at_start:
            return self._stream.read(nbytes)
        self._at_start = False
        start = b""
        while len(start) < len(codecs.BOM_UTF8) and (chunk := self._stream.read(nbytes)):
            start += chunk
        # An empty chunk would mean the end of the stream.
        return start.removeprefix(codecs.BOM_UTF8) or self._stream.read(nbytes)
