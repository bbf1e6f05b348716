"""Readers: each record is read or rejected with its reason, and both paths through a file read it alike."""

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import BadInput
from tasks.ingest import read_csv as csv_reader
from tasks.ingest import read_jsonl as jsonl_reader
from tasks.ingest.lines import cut
from tasks.ingest.read_text import read_text
from tasks.ingest.readers import FileReader
from tasks.ingest.record import Fields, Record, Rejection
from tasks.sources import Source

FIELDS = Fields(text="text", document=("chapter",), group="book")
LIMIT = 1000


def read_jsonl(data: bytes, block_bytes: int = 2**20, fields: Fields = FIELDS) -> list[Record | Rejection]:
    return list(jsonl_reader.read_jsonl(cut(io.BytesIO(data), LIMIT, block_bytes), fields))


def read_csv(data: bytes, block_bytes: int = 2**20, fields: Fields = FIELDS) -> list[Record | Rejection]:
    return list(csv_reader.read_csv(cut(io.BytesIO(data), LIMIT, block_bytes), fields, LIMIT, "file.csv"))


def outcome(record: Record | Rejection) -> str:
    return record.reason if isinstance(record, Rejection) else record.text


GOOD = b'{"text":"good","chapter":1,"book":"A"}'
JSON_LINES = [
    (b'{"text":"a","chapter":1,"book":"A"}', "a"),
    (b'{"text":"a","chapter":1,"book":"A"}\r', "a"),
    (b'{"text":"\\u00e9","chapter":"1","book":2}', "é"),
    (b'{"text":"a","chapter":1,"book":"A","score":NaN}', "a"),
    (b'{"text":"a","chapter":1,"book":"A","n":' + b"9" * 900 + b"}", "a"),
    (b'{"text":"a","text":"b","chapter":1,"book":"A"}', "b"),
    (b'{"text":"2026-01-01","chapter":1,"book":"A"}', "2026-01-01"),
    (b'{"text":"a","chapter":1,"book":"A"', "malformed JSON"),
    (b'{"text":"a","chapter":1,"book":"A"} x', "malformed JSON"),
    (b'{"text":"a","chapter":1,"book":"A"}{"text":"b","chapter":1,"book":"A"}', "malformed JSON"),
    (b'{"text":"a","chapter":1,"book":"A","n":Inf}', "malformed JSON"),
    (b'{"text":"\\ud800","chapter":1,"book":"A"}', "malformed JSON"),
    (b"nonsense", "malformed JSON"),
    (b'["a"]', "wrong type"),
    (b'{"text":1,"chapter":1,"book":"A"}', "wrong type"),
    (b'{"text":"a","chapter":1.5,"book":"A"}', "wrong type"),
    (b'{"text":"a","chapter":true,"book":"A"}', "wrong type"),
    (b'{"text":["a"],"chapter":1,"book":"A"}', "wrong type"),
    (b'{"chapter":1,"book":"A"}', "missing field"),
    (b'{"text":"a","chapter":1}', "missing field"),
    (b'{"text":null,"chapter":1,"book":"A"}', "missing field"),
    (b'{"text":"caf\xe9","chapter":1,"book":"A"}', "not UTF-8"),
    (b'{"text":"","chapter":1,"book":"A"}', "empty text"),
    (b'{"text":" \\u0007\\n","chapter":1,"book":"A"}', "empty text"),
    (b'{"text":"' + b"a" * LIMIT + b'","chapter":1,"book":"A"}', "line too long"),
]


@pytest.mark.parametrize(("line", "expected"), JSON_LINES)
def test_a_json_line_among_good_ones_is_read_or_rejected_alone(line: bytes, expected: str) -> None:
    records = read_jsonl(b"\n".join([GOOD, line, GOOD]) + b"\n")
    assert [outcome(record) for record in records] == ["good", expected, "good"]
    assert [record.line for record in records] == [1, 2, 3]
    if isinstance(records[1], Rejection):
        assert records[1].digest == xxhash.xxh3_128_hexdigest(line)
        assert records[1].size.bytes == len(line)


def test_brackets_nested_too_deep_for_json_are_rejected_by_both_paths() -> None:
    deep = b'{"text":"a","chapter":1,"book":"A","n":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    records = list(jsonl_reader.read_jsonl(cut(io.BytesIO(deep + b"\n" + GOOD), 10**6), FIELDS))
    assert [outcome(record) for record in records] == ["malformed JSON", "good"]


def test_integers_become_their_decimal_text() -> None:
    (record,) = read_jsonl(b'{"text":"a","chapter":-07,"book":3}'.replace(b"-07", b"-7"))
    assert isinstance(record, Record)
    assert (record.document, record.group) == (("-7",), "3")


_values = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["good", "é", "e\u0301", "\u2028", "\x00", "\t", '"', "\\", "}\n{", " "]),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.none(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["text", "x"]), st.text(max_size=2), max_size=2),
)
_good_row = st.fixed_dictionaries(
    {"text": st.text(max_size=8), "chapter": st.integers(0, 99), "book": st.sampled_from(["A", "B"])}
)
_any_row = st.dictionaries(st.sampled_from(["text", "chapter", "book", "other"]), _values, max_size=4)


@st.composite
def _json_files(draw: st.DrawFn) -> bytes:
    rows = draw(st.lists(st.one_of(_good_row, _good_row, _good_row, _any_row), max_size=8))
    escaped = draw(st.booleans())
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"", b" \n", b"\r"]))
    data = end.join(json.dumps(row, ensure_ascii=escaped).encode("utf-8", "surrogatepass") for row in rows)
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=0, max_size=2)), max_size=2)):
        data = data[:at] + byte + data[at + 1 :]
    return data + draw(st.sampled_from([b"\n", b""]))


def assert_paths_agree(reader, data: bytes, block_bytes: int) -> None:  # type: ignore[no-untyped-def]
    by_block = reader(data, block_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl_reader, "_parse", lambda *_: None)
        patch.setattr(csv_reader, "_parse", lambda *_: None)
        by_line = reader(data)
    assert by_block == by_line


@settings(max_examples=300, deadline=None)
@given(_json_files(), st.sampled_from([7, 64, 2**20]))
def test_json_reads_alike_by_block_and_by_line(data: bytes, block_bytes: int) -> None:
    assert_paths_agree(read_jsonl, data, block_bytes)


def test_a_plain_block_of_json_is_read_by_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_reader, "_line_by_line", lambda *_: pytest.fail("line by line"))
    assert [outcome(record) for record in read_jsonl((GOOD + b"\n") * 3 + GOOD + b"\r\n")] == ["good"] * 4


HEADER = b"text,chapter,book\n"
CSV_RECORDS = [
    (b"a,1,A", "a"),
    (b'"a, b",1,A', "a, b"),
    (b'"a ""b""",1,A', 'a "b"'),
    (b'"two\nlines",1,A', "two\nlines"),
    (b'"two\r\nlines",1,A\r', "two\nlines"),
    (b'a"b,1,A', 'a"b'),
    (b"NULL,1,A", "NULL"),
    (b"a,1", "malformed CSV"),
    (b"a,1,A,extra", "malformed CSV"),
    (b'"open,1,A', "malformed CSV"),
    (b'"closed" too early,1,A', "malformed CSV"),
    (b'"closed"""too early,1,A', "malformed CSV"),
    (b"a\rb,1,A", "malformed CSV"),
    (b"caf\xe9,1,A", "not UTF-8"),
    (b",1,A", "empty text"),
    (b"a" * (LIMIT + 1) + b",1,A", "line too long"),
]


@pytest.mark.parametrize(("raw", "expected"), CSV_RECORDS)
def test_a_csv_record_among_good_ones_is_read_or_rejected_alone(raw: bytes, expected: str) -> None:
    records = read_csv(HEADER + b"good,1,A\n" + raw + b"\ngood,2,B\n")
    assert [outcome(record) for record in records] == ["good", expected, "good"]
    assert records[1].line == 3
    assert records[2].line == 4 + raw.count(b"\n")
    if isinstance(records[1], Rejection):
        assert records[1].digest == xxhash.xxh3_128_hexdigest(raw)


def test_two_stray_quotes_do_not_swallow_the_records_between_them() -> None:
    records = read_csv(HEADER + b'"stray,1,A\n' + b"good,1,A\n" * 3 + b'"stray,1,A\n' + b"good,1,A\n")
    expected = ["malformed CSV", "good", "good", "good", "malformed CSV", "good"]
    assert [outcome(record) for record in records] == expected


_cells = st.one_of(
    st.sampled_from(["good", "", "é", 'q"', '"q"', "a,b", "two\nlines", "\r", "\r\n", " ", "7", "\x00"]),
    st.text(max_size=5),
)


@st.composite
def _csv_files(draw: st.DrawFn) -> bytes:
    written = io.StringIO()
    writer = csv.writer(written, lineterminator=draw(st.sampled_from(["\n", "\r\n", "\n\n"])))
    writer.writerow(["text", "chapter", "book"])
    plain = st.tuples(st.sampled_from(["good", "better", "best, of all"]), st.just("1"), st.sampled_from("AB"))
    writer.writerows(draw(st.lists(st.one_of(plain, plain, st.lists(_cells, max_size=4)), max_size=8)))
    data = written.getvalue().encode("utf-8", "surrogatepass")
    pieces = st.sampled_from([b'"', b",", b"\n", b"\r", b"\xe9", b"x", b""])
    for at, piece in draw(st.lists(st.tuples(st.integers(20, 120), pieces), max_size=3)):
        data = data[:at] + piece + data[at:]
    return data


@settings(max_examples=300, deadline=None)
@given(_csv_files(), st.sampled_from([9, 64, 2**20]))
def test_csv_reads_alike_by_block_and_by_record(data: bytes, block_bytes: int) -> None:
    assert_paths_agree(read_csv, data, block_bytes)


def test_a_plain_block_of_csv_is_read_by_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_reader, "_record_by_record", lambda *_: pytest.fail("record by record"))
    assert [outcome(record) for record in read_csv(HEADER + b'good,1,A\n"go, od",2,B\n')] == ["good", "go, od"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"title,chapter,book", "no columns are named 'text'; the header has 'title', 'chapter', 'book'"),
        (b"text,text,chapter,book", "2 columns are named 'text'"),
        (b"t\xe9xt,chapter,book", "the header is unreadable"),
        (b"t" * 2000, "the header is unreadable"),
    ],
)
def test_a_csv_header_without_the_fields_is_refused(header: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_csv(header + b"\na,1,A\n")


class LongLineStream:
    """A line of ``size`` bytes before and after short ones, made as it is read."""

    def __init__(self, size: int) -> None:
        self._pieces = self._make(size)

    @staticmethod
    def _make(size: int) -> Iterator[bytes]:
        yield GOOD + b"\n"
        for _ in range(size // 65536):
            yield b"x" * 65536
        yield b"\n" + GOOD + b"\n" + GOOD

    def read(self, nbytes: int, /) -> bytes:
        return next(self._pieces, b"")


def test_a_line_of_many_megabytes_is_rejected_without_being_held() -> None:
    size = 64 * 2**20
    tracemalloc.start()
    records = list(jsonl_reader.read_jsonl(cut(LongLineStream(size), LIMIT, 65536), FIELDS))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [outcome(record) for record in records] == ["good", "line too long", "good", "good"]
    assert [record.line for record in records] == [1, 2, 3, 4]
    assert records[1].size.bytes == records[1].size.characters == size
    assert isinstance(records[1], Rejection)
    assert records[1].digest == xxhash.xxh3_128_hexdigest(b"x" * size)
    assert peak < 4 * 2**20


@given(st.lists(st.binary(max_size=12), max_size=10), st.integers(1, 16), st.integers(0, 8), st.booleans())
@settings(max_examples=300, deadline=None)
def test_blocks_and_long_lines_together_are_the_lines_of_the_file(
    lines: list[bytes], block_bytes: int, limit: int, ended: bool
) -> None:
    data = b"\n".join(lines) + (b"\n" if ended else b"")
    expected = data.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    found: dict[int, bytes | str] = {}
    for piece in cut(io.BytesIO(data), limit, block_bytes):
        found |= {piece.line: piece.digest} if isinstance(piece, Rejection) else dict(piece.lines())
    assert list(found) == list(range(1, len(expected) + 1))
    assert list(found.values()) == [
        line if len(line) <= limit else xxhash.xxh3_128_hexdigest(line) for line in expected
    ]


@pytest.mark.parametrize("block_bytes", [1, 3, 2**20])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"one\ntwo\n", "one\ntwo\n"),
        ("é\r\n".encode(), "é\n"),
        (b"caf\xe9", "not UTF-8"),
        ("\ufeffcafé".encode("utf-16-le"), "not UTF-8"),
        (b"short\n" + b"x" * (LIMIT + 1) + b"\nshort", "line too long"),
        (b"x\n" * LIMIT, "x\n" * LIMIT),
        (b"x\n" * 50 * LIMIT, "x\n" * 50 * LIMIT),
        (b"x\n" * 50 * LIMIT + b"x", "line too long"),
    ],
)
def test_a_text_file_is_one_record(data: bytes, expected: str, block_bytes: int) -> None:
    (record,) = read_text(io.BytesIO(data), LIMIT, block_bytes)
    assert outcome(record) == expected
    if isinstance(record, Rejection):
        assert record.digest == xxhash.xxh3_128_hexdigest(data)
        assert record.size.bytes == len(data)
        assert (record.detail == "it is UTF-16") == data.startswith(b"\xff\xfe")


@pytest.mark.parametrize("data", [b"", b" \r\n\t", b"\x00\x07", "\u3000".encode()])
def test_a_text_file_without_text_is_no_record_and_no_rejection(data: bytes) -> None:
    assert list(read_text(io.BytesIO(data), LIMIT)) == []


def test_of_a_text_that_is_read_its_text_alone_is_held() -> None:
    stream = io.BytesIO(b"In the beginning.\n" * 200_000)
    tracemalloc.start()
    reading = read_text(stream, 10**6)
    record = next(reading)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # And pieces of the last block.
    assert held < 2 * record.size.bytes


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.zst", "a.csv", "a.parquet", "a.parquet.gz"])
def test_a_file_without_a_byte_is_not_damaged_but_empty(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    assert list(FileReader(path, source(name.split(".")[1]), LIMIT)) == []


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b'{"words":"a","chapter":1}', "no 'text'; it has 'words', 'chapter'"),
        (b"{}", "no 'text'; it has no field"),
        (b'{"text":"a","chapter":null,"book":"A"}', "'chapter' is null"),
        (b'{"text":"a","chapter":1}', "no 'book'; it has 'text', 'chapter'"),
        (b'{"text":["a"],"chapter":1,"book":"A"}', "'text' is a list"),
        (b'{"text":"a","chapter":1.5,"book":"A"}', "'chapter' is a number"),
        (b'{"text":"a","chapter":1,"book":true}', "'book' is true or false"),
        (b'"a"', "the line is no object in braces"),
        (b'{"text":"a",}', "at column "),
        (b'{"text":"a', "Unterminated string starting at column 9"),
        (b'{"\\ud800\\n' + b"k" * 60 + b'":1}', "it has '\\ud800\\n" + "k" * 38 + "…'"),
        (b"{" + b",".join(b'"%d":1' % n for n in range(11)) + b"}", "'6', '7' and 3 more"),
        (b'{"text":"' + b"a" * LIMIT + b'","chapter":1,"book":"A"}', "1,034 bytes"),
    ],
)
def test_a_rejection_says_which_field_is_at_fault_and_which_are_there(line: bytes, detail: str) -> None:
    (record,) = read_jsonl(line)
    assert isinstance(record, Rejection)
    assert detail in record.detail
    assert record.detail.isprintable()


def source(format_: str) -> Source:
    fields = {"text_field": "text", "document_fields": ["chapter"], "group_field": "book"}
    tabular = format_ in ("jsonl", "csv", "parquet")
    base = {"name": "s", "uri": "u", "format": format_, "licence": "CC0-1.0"}
    return Source.model_validate(base | (fields if tabular else {}))


def table(texts: list[bytes | None], type_: pa.DataType | None = None) -> pa.Table:
    column = pa.array(texts, pa.binary())
    return pa.table(
        {
            "text": column.view(pa.string()) if type_ is None else column.cast(type_),
            "chapter": pa.array([1] * len(texts), pa.int32()),
            "book": pa.array(["A"] * len(texts)).dictionary_encode(),
        }
    )


def content(format_: str) -> bytes:
    if format_ == "parquet":
        written = io.BytesIO()
        pq.write_table(table([b"good"] * 50), written)
        return written.getvalue()
    return {"jsonl": (GOOD + b"\n") * 50, "csv": HEADER + b"good,1,A\n" * 50, "txt": b"good", "md": b"good"}[format_]


FORMATS = ["jsonl", "csv", "parquet", "txt", "md"]


def compress(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    return bytes(pa.compress(data, "zstd", asbytes=True)) if ending == ".zst" else data


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("format_", FORMATS)
def test_each_format_is_read_plain_and_compressed(tmp_path: Path, format_: str, ending: str) -> None:
    path = tmp_path / f"file.{format_}{ending}"
    path.write_bytes(compress(content(format_), ending))
    reader = FileReader(path, source(format_), LIMIT)
    records = list(reader)
    assert {outcome(record) for record in records} == {"good"}
    assert len(records) == (1 if format_ in ("txt", "md") else 50)
    assert reader.position == path.stat().st_size
    if format_ not in ("txt", "md"):
        assert {(record.document, record.group) for record in records if isinstance(record, Record)} == {(("1",), "A")}


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_truncated_compressed_file_is_named(tmp_path: Path, format_: str, ending: str) -> None:
    path = tmp_path / f"file.{format_}{ending}"
    path.write_bytes(compress(content(format_), ending)[:-3])
    with pytest.raises(BadInput, match=rf"file\.{format_}\{ending}: damaged, truncated"):
        list(FileReader(path, source(format_), LIMIT))


@pytest.mark.parametrize("name", ["file.parquet", "file.jsonl.gz", "file.csv.zst"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"something else altogether\n" * 10)
    with pytest.raises(BadInput, match=f"{name}: damaged, truncated or not what its name says"):
        list(FileReader(path, source(name.split(".")[1]), LIMIT))


@pytest.mark.parametrize("format_", ["jsonl", "csv", "txt"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, format_: str) -> None:
    path = tmp_path / f"file.{format_}"
    path.write_bytes(b"\xef\xbb\xbf" + content(format_))
    records = list(FileReader(path, source(format_), LIMIT, block_bytes=2))
    assert {outcome(record) for record in records} == {"good"}


def test_parquet_rows_are_rejected_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    pq.write_table(table([b"good", None, b"caf\xe9", b"", b"x" * (LIMIT + 1), b"good"]), path)
    records = list(FileReader(path, source("parquet"), LIMIT))
    expected = ["good", "missing field", "not UTF-8", "empty text", "line too long", "good"]
    assert [outcome(record) for record in records] == expected
    assert [record.line for record in records] == [1, 2, 3, 4, 5, 6]
    details = [record.detail for record in records if isinstance(record, Rejection)]
    assert details == ["'text' is null", "", "", f"{LIMIT + 1:,} bytes"]


def test_a_text_that_a_small_file_becomes_is_rejected_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    text = b"x\n" * 2**24
    path.write_bytes(gzip.compress(text))
    tracemalloc.start()
    (rejection,) = FileReader(path, source("txt"), LIMIT, block_bytes=65536)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(rejection, Rejection)
    assert rejection.digest == xxhash.xxh3_128_hexdigest(text)
    assert rejection.detail == "33,554,432 bytes in all, over 100 x max_line_bytes"
    assert peak < 16 * 2**20


def test_a_value_that_many_rows_of_parquet_have_is_not_held_once_for_each(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    pq.write_table(table([b"x" * 2**20] * 500), path, compression="zstd")
    before = pa.total_allocated_bytes()
    records = iter(FileReader(path, source("parquet"), LIMIT))
    assert outcome(next(records)) == "line too long"
    assert pa.total_allocated_bytes() - before < 256 * 2**20
    assert len(list(records)) == 499


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"body": ["a"], "chapter": [1], "book": ["A"]},
            "no columns are named 'text'; the file has 'body', 'chapter', 'book'",
        ),
        ({"text": [1], "chapter": [1], "book": ["A"]}, "the column 'text' holds int64"),
        ({"text": ["a"], "chapter": [1.5], "book": ["A"]}, "the column 'chapter' holds double"),
    ],
)
def test_a_parquet_file_without_the_columns_is_refused(
    tmp_path: Path, rows: dict[str, list[object]], message: str
) -> None:
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table(rows), path)
    with pytest.raises(BadInput, match=message):
        list(FileReader(path, source("parquet"), LIMIT))
