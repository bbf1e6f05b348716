"""The stage ``ingest``: what reaches the corpus, what the report says of it, and how it refuses."""

import json
import subprocess
import unicodedata
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from corpora import collect_params, ingest_params, rows, source
from hypothesis import given
from hypothesis import strategies as st
from tiny import files_of

from tasks import paths
from tasks.errors import BadInput, DiskFull
from tasks.ingest import tables
from tasks.ingest.document import Document, join
from tasks.ingest.ingest import REFUSED, ingest
from tasks.ingest.normalize import normalize
from tasks.ingest.record import Record, size_of
from tasks.ingest.report import Amounts, CorpusReport
from tasks.ingest.split import SPLITS

BOOKS = 30


def notes(**changes: Any) -> dict[str, Any]:
    return {"name": "notes", "uri": "anywhere", "format": "txt", "licence": "CC0-1.0"} | changes


def verses(book: int) -> list[dict[str, Any]]:
    return [
        {"text": f"book {book}, chapter {chapter}, verse {verse}", "book": f"Book {book}", "chapter": chapter}
        for chapter in (1, 2)
        for verse in (1, 2)
    ]


@pytest.fixture
def bible(project: Path, write_jsonl) -> Path:  # type: ignore[no-untyped-def]
    file = project / "data/raw/bible/verses.jsonl"
    write_jsonl(file, [row for book in range(BOOKS) for row in verses(book)])
    return file


def everything() -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in rows(split)]


def test_verses_become_chapters_and_books_stay_together(bible: Path) -> None:
    report = ingest(collect_params(source()), ingest_params())
    assert len(everything()) == 2 * BOOKS
    first = next(row for row in everything() if row["id"] == "bible/verses.jsonl:1")
    assert first == {
        "text": "book 0, chapter 1, verse 1\nbook 0, chapter 1, verse 2",
        "source": "bible",
        "group": "Book 0",
        "id": "bible/verses.jsonl:1",
    }
    groups = [{row["group"] for row in rows(split)} for split in SPLITS]
    assert sum(map(len, groups)) == len(set().union(*groups)) == BOOKS
    assert {split: set(report.splits[split].group_names or ()) for split in SPLITS} == dict(
        zip(SPLITS, groups, strict=True)
    )


def test_the_corpus_is_the_same_byte_for_byte_when_it_is_made_again(bible: Path) -> None:
    with bible.open("a") as file:
        file.write("nonsense\n")
    ingest(collect_params(source()), ingest_params())
    before = files_of(paths.CORPUS)
    (bible.parent / ".partial-left.jsonl").write_text("left by a killed copy")
    bible.touch()
    ingest(collect_params(source()), ingest_params())
    assert files_of(paths.CORPUS) == before


def test_a_group_keeps_its_split_when_other_groups_come(bible: Path, write_jsonl) -> None:  # type: ignore[no-untyped-def]
    ingest(collect_params(source()), ingest_params())
    before = {row["text"]: split for split in SPLITS for row in rows(split)}
    write_jsonl(bible.parent / "a.jsonl", [row for book in range(BOOKS, 2 * BOOKS) for row in verses(book)])
    ingest(collect_params(source()), ingest_params())
    after = {row["text"]: split for split in SPLITS for row in rows(split)}
    assert len(after) == 2 * len(before)
    assert before.items() <= after.items()


def test_without_a_group_the_text_decides_and_not_its_place(project: Path, bible: Path, write_jsonl) -> None:  # type: ignore[no-untyped-def]
    flat = source(document_fields=[], group_field=None)
    ingest(collect_params(flat), ingest_params())
    before = {row["text"]: split for split in SPLITS for row in rows(split)}
    lines = bible.read_text().splitlines(keepends=True)
    bible.write_text("".join(reversed(lines)))
    ingest(collect_params(flat), ingest_params())
    assert {row["text"]: split for split in SPLITS for row in rows(split)} == before
    assert {row["group"] for row in everything()} == {None}


def test_without_a_group_a_document_that_records_are_added_to_stays_in_its_split(  # type: ignore[no-untyped-def]
    bible: Path, write_jsonl
) -> None:
    def beginnings() -> list[set[str]]:
        ingest(collect_params(source(group_field=None)), ingest_params())
        return [{row["text"].split("\n")[0] for row in rows(split)} for split in SPLITS]

    before = beginnings()
    for night in range(3):
        chapters = [verses(book)[at : at + 2] for book in range(BOOKS) for at in (0, 2)]
        added = [{**chapter[-1], "text": f"added in night {n}"} for chapter in chapters for n in range(night + 1)]
        write_jsonl(bible, sorted(chain(*chapters, added), key=lambda row: (row["book"], row["chapter"])))
        assert beginnings() == before


def test_a_report_counts_each_record_character_and_byte(project: Path, bible: Path) -> None:
    bad = b'{"text": "caf\xe9", "book": "Book 0", "chapter": 3}'
    copies = [{"text": "e\u0301\r\nx\u0007", "book": "Book 0", "chapter": chapter} for chapter in (4, 5, 6)]
    extra = [bad, b"{", *(json.dumps(copy, ensure_ascii=False).encode() for copy in copies)]
    with bible.open("ab") as file:
        file.write(b"\n".join(extra))
    (project / "data/raw/notes").mkdir()
    (project / "data/raw/notes/note.md").write_text("café\n")
    report = ingest(collect_params(source(), notes(format="md")), ingest_params())

    texts = [row["text"] for book in range(BOOKS) for row in verses(book)]
    bible_report, notes_report = report.sources
    assert bible_report.records.model_dump() == {
        "in_": 4 * BOOKS + 5,
        "kept": 4 * BOOKS + 3,
        "rejected": 2,
        "reasons": {"malformed JSON": 1, "not UTF-8": 1},
    }
    assert bible_report.documents.model_dump() == {"in_": 2 * BOOKS + 3, "out": 2 * BOOKS + 1, "duplicated": 2}
    out = sum(map(len, texts)) + 2 * BOOKS + len("é\nx")
    assert bible_report.characters.model_dump() == {
        "in_": sum(map(len, texts)) + len(bad) + 1 + 3 * len("e\u0301\r\nx\u0007"),
        "out": out,
        "rejected": len(bad) + 1,
        "duplicated": 2 * len("é\nx"),
        "normalized": 3 * 3 - 2 * BOOKS,
    }
    assert bible_report.bytes.out == out + 1
    assert notes_report.bytes.out == 6
    assert notes_report.characters.out == 5
    written = json.loads(paths.CORPUS_REPORT.read_text())
    assert written["sources"][0]["records"]["in"] == 4 * BOOKS + 5
    assert CorpusReport.model_validate(written) == report
    for split in SPLITS:
        assert sum(len(row["text"].encode()) for row in rows(split)) == report.splits[split].bytes


def test_sums_that_do_not_add_up_cannot_be_reported() -> None:
    with pytest.raises(ValueError, match="do not add up: 10 and 9"):
        Amounts(in_=10, out=7, rejected=1, duplicated=0, normalized=1)


def test_the_sha256_of_a_source_is_that_of_what_sha256sum_prints(bible: Path) -> None:
    (bible.parent / "b.jsonl").write_text("")
    report = ingest(collect_params(source()), ingest_params())
    command = "sha256sum b.jsonl verses.jsonl | sha256sum"
    printed = subprocess.run(command, shell=True, cwd=bible.parent, capture_output=True, text=True, check=True)
    assert printed.stdout.split()[0] == report.sources[0].sha256


def test_every_rejected_record_lies_in_quarantine(bible: Path) -> None:
    number = 4 * BOOKS
    with bible.open("a") as file:
        file.write("nonsense\n" + json.dumps({"text": "x" * 5 * 2**20}) + "\n")
    ingest(collect_params(source()), ingest_params())
    table = pq.read_table(paths.QUARANTINE)
    assert table.schema.equals(tables.QUARANTINE_SCHEMA)
    found = table.to_pylist()
    assert [(row["source"], row["file"], row["line"], row["reason"], row["bytes"]) for row in found] == [
        ("bible", "verses.jsonl", number + 1, "malformed JSON", 8),
        ("bible", "verses.jsonl", number + 2, "line too long", 5 * 2**20 + 12),
    ]
    assert [row["detail"] for row in found] == ["Expecting value at column 1", "5,242,892 bytes"]
    assert len({row["digest"] for row in found}) == 2


def test_only_the_named_sources_are_read(project: Path, bible: Path) -> None:
    other = project / "data/raw/other/x.jsonl"
    other.parent.mkdir()
    other.write_text("nonsense\n" * 1000)
    report = ingest(collect_params(source()), ingest_params())
    assert [part.name for part in report.sources] == ["bible"]
    assert {row["source"] for row in everything()} == {"bible"}


def test_large_splits_come_in_parts_of_several_row_groups(bible: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest(collect_params(source()), ingest_params())
    whole = everything()
    monkeypatch.setattr(tables, "BYTES_PER_ROW_GROUP", 100)
    monkeypatch.setattr(tables, "BYTES_PER_PART", 300)
    ingest(collect_params(source()), ingest_params())
    parts = sorted((paths.CORPUS / "train").iterdir())
    assert len(parts) > 3
    assert pq.read_metadata(parts[0]).num_row_groups > 1
    assert everything() == whole


class TestRefusals:
    """Each is one line that names the place, exits with 2 and leaves no corpus."""

    def refuse(self, run_stage, the_error) -> str:  # type: ignore[no-untyped-def]
        message: str = the_error(run_stage("ingest"))
        assert not list(Path("data").glob("*corpus*"))
        return message

    def test_too_many_rejections(self, bible: Path, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        with bible.open("ab") as file:
            file.write(b"{\n" * 3 + b"\xe9\n" * 4 + b"[1]\n" * 2 + b'{"text": 1, "book": "", "chapter": 1}\n' + b"{}\n")
        write_params(collect={"sources": [source()]}, ingest={"max_reject_rate": 0.05})
        message = self.refuse(run_stage, the_error)
        assert "source 'bible': 11 of 131 records are rejected (8.40%; ingest.max_reject_rate allows 5.00%)" in message
        file = "first in data/raw/bible/verses.jsonl line"
        assert f": not UTF-8 (4, {file} 124); malformed JSON (3, {file} 121: Expecting property name " in message
        assert f"wrong type (3, {file} 128: the line is no object in braces); and 1 more reason. " in message
        assert str(REFUSED) in message
        assert pq.read_table(REFUSED).num_rows == 11

    def test_a_missing_field_is_named_beside_those_that_are_there(  # type: ignore[no-untyped-def]
        self, bible: Path, write_params, run_stage, the_error
    ) -> None:
        write_params(collect={"sources": [source(text_field="words")]})
        message = self.refuse(run_stage, the_error)
        assert "missing field (120, first in data/raw/bible/verses.jsonl line 1: no 'words'; it has 'text', " in message
        assert "'book', 'chapter')." in message
        assert "until you delete it there), or the names of its fields, or raise the rate in params.yaml." in message

    def test_a_text_is_named_without_a_line(self, project: Path, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        folder = project / "data/raw/notes"
        folder.mkdir(parents=True)
        (folder / "a.txt").write_bytes(b"caf\xe9")
        (folder / "b.txt").write_text("x" * 200)
        write_params(collect={"sources": [notes()]}, ingest={"max_line_bytes": 100})
        message = self.refuse(run_stage, the_error)
        assert "not UTF-8 (1, first in data/raw/notes/a.txt); " in message
        assert "line too long (1, first in data/raw/notes/b.txt: 200 bytes)." in message
        assert "raise the rate (or ingest.max_line_bytes, for the lines that are too long) in params.yaml" in message

    def test_a_name_that_is_not_utf8(self, bible: Path, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        (bible.parent / "caf\udce9.jsonl").write_text("")
        write_params(collect={"sources": [source()]})
        assert r"data/raw/bible/caf\udce9.jsonl: its name is not UTF-8" in self.refuse(run_stage, the_error)

    def test_a_link_to_nowhere(self, bible: Path, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        (bible.parent / "z.jsonl").symlink_to("gone")
        write_params(collect={"sources": [source()]})
        assert "data/raw/bible/z.jsonl: a link to a file that is not there" in self.refuse(run_stage, the_error)

    def test_nothing_collected(self, project: Path, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        write_params(collect={"sources": [source()]})
        message = self.refuse(run_stage, the_error)
        assert "data/raw/bible: no file of source 'bible'. Collect first" in message

    def test_an_empty_corpus(self, bible: Path, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        bible.write_text("\n\n")
        write_params(collect={"sources": [source()]})
        assert "the corpus is empty" in self.refuse(run_stage, the_error)

    def test_an_empty_split(self, bible: Path, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        write_params(collect={"sources": [source()]}, ingest={"split": {"seed": 1, "valid": 0.3, "test": 0.000001}})
        message = self.refuse(run_stage, the_error)
        assert "the test split is empty: 30 groups, dealt out by ingest.split.seed 1" in message
        assert "Change the seed, raise ingest.split.test" in message

    def test_fewer_texts_than_splits(self, project: Path, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        folder = project / "data/raw/notes"
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("In the beginning.\n")
        (folder / "b.txt").write_text("The end.\n")
        write_params(collect={"sources": [notes()]})
        message = self.refuse(run_stage, the_error)
        assert "split is empty: 2 groups, and train, valid, test need one each at least. Collect more text" in message
        # No seed deals out two to three.
        assert "seed" not in message

    def test_a_damaged_file(self, bible: Path, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        (bible.parent / "z.jsonl.gz").write_bytes(b"\x1f\x8b\x08 and no more")
        write_params(collect={"sources": [source()]})
        assert "data/raw/bible/z.jsonl.gz: damaged, truncated" in self.refuse(run_stage, the_error)

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ({"max_reject_rat": 0.1}, "ingest.max_reject_rat: unknown key; did you mean `max_reject_rate`?"),
            ({"max_reject_rate": "1%"}, "ingest.max_reject_rate: input should be a valid number"),
            ({"split": {"seed": 1, "valid": 0.5, "test": 0.5}}, "leave nothing to train on"),
        ],
    )
    def test_a_wrong_parameter(  # type: ignore[no-untyped-def]
        self, bible: Path, write_params, run_stage, the_error, keys: dict[str, object], expected: str
    ) -> None:
        write_params(collect={"sources": [source()]}, ingest=keys)
        assert expected in self.refuse(run_stage, the_error)


def test_files_without_text_are_told_and_left_out(project: Path, run_stage, write_params) -> None:  # type: ignore[no-untyped-def]
    folder = project / "data/raw/notes"
    folder.mkdir(parents=True)
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"note {number}")
    for name in ("e.txt", "f.txt", "g.txt", "h.txt"):
        (folder / name).write_text(" \n")
    write_params(
        collect={"sources": [notes()]},
        ingest={"max_reject_rate": 0.0, "split": {"seed": 2, "valid": 0.2, "test": 0.2}},
    )
    result = run_stage("ingest")
    assert result.returncode == 0, result.stderr
    assert (
        "ingest    notice: notes: 4 files hold no text and are left out "
        "(data/raw/notes/e.txt, data/raw/notes/f.txt, data/raw/notes/g.txt and 1 more)\n"
    ) in result.stderr
    told = json.loads(paths.CORPUS_REPORT.read_text())["sources"][0]
    assert (told["files"], told["empty_files"], told["records"]["in"]) == (16, 4, 12)


def test_a_file_that_is_rejected_is_told_though_few_are(project: Path, run_stage, write_params) -> None:  # type: ignore[no-untyped-def]
    folder = project / "data/raw/notes"
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"note {number}")
    (folder / "diary.txt").write_bytes(b"caf\xe9\n")
    settings: dict[str, Any] = {"max_reject_rate": 0.1, "split": {"seed": 2, "valid": 0.2, "test": 0.2}}
    write_params(collect={"sources": [notes()]}, ingest=settings)
    result = run_stage("ingest")
    assert result.returncode == 0, result.stderr
    told = "notice: notes: 1 file is rejected and left out: not UTF-8 (1, first in data/raw/notes/diary.txt)\n"
    assert told in result.stderr


def test_the_last_line_of_progress_counts_the_rejected_records_of_all_sources(  # type: ignore[no-untyped-def]
    project: Path, bible: Path, run_stage, write_params
) -> None:
    other = project / "data/raw/other/verses.jsonl"
    other.parent.mkdir()
    other.write_text(bible.read_text() + "{\n" * 8)
    with bible.open("a") as file:
        file.write("{\n")
    split = {"seed": 1, "valid": 0.2, "test": 0.2}
    write_params(collect={"sources": [source(), source(name="other")]}, ingest={"max_reject_rate": 0.5, "split": split})
    result = run_stage("ingest")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1].endswith("rejected 9")


def test_a_refused_corpus_leaves_the_last_good_one_as_it_was(bible: Path) -> None:
    ingest(collect_params(source()), ingest_params())
    before = files_of(paths.CORPUS)
    bible.write_text("nonsense\n")
    with pytest.raises(BadInput):
        ingest(collect_params(source()), ingest_params())
    assert files_of(paths.CORPUS) == before


def test_a_full_disk_is_told_and_leaves_no_corpus(project: Path, bible: Path, small_disk) -> None:  # type: ignore[no-untyped-def]
    raw = (project / "data/raw").rename(project / "raw")
    small_disk(project / "data", 64)
    (project / "data/raw").symlink_to(raw)
    noise = [{"text": f"{'%x' % (3 ** (1000 + n))}", "book": f"B{n}", "chapter": 1} for n in range(500)]
    bible_file = raw / "bible/verses.jsonl"
    bible_file.write_text("".join(json.dumps(row) + "\n" for row in noise))
    with pytest.raises(DiskFull, match=r"data/corpus: the disk is full"):
        ingest(collect_params(source()), ingest_params())
    assert [path.name for path in (project / "data").iterdir()] == ["raw"]


CASES = [
    ("plain\ttext ", "plain\ttext "),
    ("a\r\nb\rc\u2028d\x0be\x85f", "a\nb\nc\nd\ne\nf"),
    ("a\x00b\x1b[0m\x9f", "ab[0m"),
    ("e\u0301", "é"),
    ("e\x07\u0301", "é"),
    ("\u212b", "Å"),
    ("ﬁ²", "ﬁ²"),
    ("\u200b\u200d👩‍👩‍👧", "\u200b\u200d👩‍👩‍👧"),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_a_text_is_normalized_to(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.text())
def test_normalizing_twice_changes_nothing_more(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not [char for char in once if unicodedata.category(char) == "Cc" and char not in "\n\t"]


def record(line: int, text: str, *document: str, group: str | None = None) -> Record:
    return Record(line, text, document, group, size_of(text))


@pytest.mark.parametrize(
    ("records", "documents"),
    [
        ([], []),
        ([record(1, "a"), record(2, "b")], [Document("a", None, 1, 1, "a"), Document("b", None, 2, 1, "b")]),
        ([record(1, "a", "1"), record(3, "b", "1")], [Document("a\nb", None, 1, 2, "a")]),
        (
            [record(1, "a", "1"), record(2, "b", "2"), record(3, "c", "1")],
            [Document("a", None, 1, 1, "a"), Document("b", None, 2, 1, "b"), Document("c", None, 3, 1, "c")],
        ),
        (
            [record(1, "a", "1", group="Obadiah"), record(2, "b", "1", group="Jonah")],
            [Document("a", "Obadiah", 1, 1, "a"), Document("b", "Jonah", 2, 1, "b")],
        ),
    ],
)
def test_consecutive_records_of_one_document_are_joined(records: list[Record], documents: list[Document]) -> None:
    assert list(join(records)) == documents
