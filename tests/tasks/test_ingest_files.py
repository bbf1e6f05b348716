"""Which split a text lies in that is a file of its own: a diary, a log or a page of a wiki, another one each night."""

import gzip
import unicodedata
from pathlib import Path

import pytest
from corpora import collect_params, ingest_params, rows, source

from tasks import paths
from tasks.errors import BadInput
from tasks.ingest.ingest import ingest
from tasks.ingest.split import SPLITS, SplitName, split_of

NIGHTS = 12
NAMES = [f"notes/{number}.txt" for number in range(40)]
# The first two names of each split.
DEALT = {
    split: [name for name in NAMES if split_of(name.encode(), ingest_params().split) == split][:2] for split in SPLITS
}


def files(name: str = "notes") -> dict[str, object]:
    return source(name=name, format="txt", text_field=None, document_fields=[], group_field=None)


@pytest.fixture
def raw(project: Path) -> Path:
    """The raw files of the source ``notes``: two of each split."""
    for names in DEALT.values():
        for name in names:
            write(project / "data/raw/notes" / name, f"the first night of {name}\n")
    return project / "data/raw/notes"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def splits(column: str = "group") -> dict[str, set[SplitName]]:
    found: dict[str, set[SplitName]] = {}
    for split in SPLITS:
        for row in rows(split):
            found.setdefault(row[column], set()).add(split)
    return found


def test_a_file_that_grows_each_night_stays_in_its_split(raw: Path) -> None:
    for night in range(NIGHTS):
        for names in DEALT.values():
            for name in names:
                with (raw / name).open("a") as file:
                    file.write(f"and night {night}\n")
        report = ingest(collect_params(files()), ingest_params())
        assert splits() == {name: {split} for split, names in DEALT.items() for name in names}
        assert {split: report.splits[split].group_names for split in SPLITS} == DEALT


@pytest.mark.parametrize("held_out", ["valid", "test"])
def test_a_file_that_is_packed_stays_in_its_split_beside_what_was_collected_before(
    raw: Path, held_out: SplitName
) -> None:
    name, *_ = DEALT[held_out]
    before = (raw / name).read_bytes()
    (raw / f"{name}.gz").write_bytes(gzip.compress(before + b"and one more\n"))
    ingest(collect_params(files()), ingest_params())
    assert splits()[name] == {held_out}
    assert {row["id"] for row in rows(held_out) if row["group"] == name} == {f"notes/{name}:1", f"notes/{name}.gz:1"}


def test_a_name_that_another_system_has_decomposed_is_the_same(raw: Path) -> None:
    composed = next(
        name
        for name in (f"caf\u00e9 {number}.txt" for number in range(40))
        if split_of(name.encode(), ingest_params().split) == "test"
    )
    write(raw / unicodedata.normalize("NFD", composed), "decomposed\n")
    ingest(collect_params(files()), ingest_params())
    assert splits()[composed] == {"test"}


def test_a_renamed_file_is_another_group(raw: Path) -> None:
    (held_out, *_), (trained, *_) = DEALT["test"], DEALT["train"]
    (raw / held_out).rename(raw / trained)
    ingest(collect_params(files()), ingest_params())
    assert splits()[trained] == {"train"}
    assert held_out not in splits()


def test_what_a_source_of_another_format_has_left_is_named_and_not_read(raw: Path) -> None:
    write(raw / "talks.jsonl.gz", "")
    told = r"^data/raw/notes/talks\.jsonl\.gz: a file of jsonl, and source 'notes' has the format txt .*remove what was"
    with pytest.raises(BadInput, match=told):
        ingest(collect_params(files()), ingest_params())
    # One that the source names is read whatever its ending, as one that ends in no format is.
    (raw / "talks.jsonl.gz").rename(raw / "talks.jsonl")
    write(raw / "talks.jsonl", "spoken\n")
    write(raw / "README", "written\n")
    ingest(collect_params(files() | {"uri": "texts/talks.jsonl"}), ingest_params())
    assert {"talks.jsonl", "README"} < splits().keys()


def test_a_text_is_read_alike_whichever_of_the_formats_of_texts_its_source_has(raw: Path) -> None:
    write(raw / "page.md", "collected when the source named this one\n")
    ingest(collect_params(files()), ingest_params())
    ours = splits()
    assert "page.md" in ours
    ingest(collect_params(files() | {"format": "md"}), ingest_params())
    assert splits() == ours


def test_equal_texts_under_two_names_are_one_text_in_train(raw: Path) -> None:
    for names in (DEALT["test"], DEALT["train"]):
        write(raw / names[0], "the same text\n")
    report = ingest(collect_params(files()), ingest_params())
    assert splits("text")["the same text\n"] == {"train"}
    assert report.sources[0].documents.duplicated == 1


def test_files_of_one_name_are_one_group_whatever_their_source(raw: Path) -> None:
    for names in DEALT.values():
        for name in names:
            write(paths.RAW / "wiki" / name, f"another text of {name}\n")
    report = ingest(collect_params(files(), files("wiki")), ingest_params())
    assert splits() == {name: {split} for split, names in DEALT.items() for name in names}
    assert {split: report.splits[split].documents for split in SPLITS} == dict.fromkeys(SPLITS, 4)
    assert {split: report.splits[split].groups for split in SPLITS} == dict.fromkeys(SPLITS, 2)
