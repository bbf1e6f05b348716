"""Plain text and Markdown: one file is one document."""

import codecs
from collections.abc import Iterator

from tasks.ingest.lines import BLOCK_BYTES, LongLine, Readable
from tasks.ingest.record import Fields, Record, Rejection, accept, reject

# A text is held whole, and so may be as long as so many of the longest lines: a hundred books by default.
LONGEST_LINES = 100
_NO_FIELDS = Fields(text="", document=(), group=None)


def read_text(stream: Readable, max_line_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Record | Rejection]:
    """Yields the file's one record, or its rejection; a file with a line over the limit is not held in memory, nor one
    that is ``LONGEST_LINES`` times as long.

    A file without text yields nothing: unlike an empty record among others, it is no sign of a damaged source.
    """
    whole = LongLine(1)
    chunks: list[bytes] = []
    line_bytes, text_bytes, too_long, most = 0, 0, False, LONGEST_LINES * max_line_bytes
    while chunk := stream.read(block_bytes):
        whole.add(chunk)
        first, *others = chunk.split(b"\n")
        lengths = [line_bytes + len(first), *(len(line) for line in others)]
        line_bytes, text_bytes = lengths[-1], text_bytes + len(chunk)
        too_long = too_long or max(lengths) > max_line_bytes or text_bytes > most
        if too_long:
            chunks.clear()
        else:
            chunks.append(chunk)
    if too_long:
        yield whole.rejection(f" in all, over {LONGEST_LINES} x max_line_bytes" if text_bytes > most else "")
        return
    joined = b"".join(chunks)
    chunks.clear()
    record = _read(joined)
    # While the record is at work, its text alone is held.
    del joined
    if record is not None:
        yield record


def _read(data: bytes) -> Record | Rejection | None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        # What some editors on Windows call Unicode.
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return reject(1, "not UTF-8", data, "it is UTF-16" if is_utf16 else "")
    record = accept(1, text, (), _NO_FIELDS, data)
    return record if isinstance(record, Record) else None
