"""Which split a text lies in, however many groups hold it."""

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from corpora import collect_params, ingest_params, rows, source
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import files_of

from tasks import paths
from tasks.ingest import tables
from tasks.ingest.ingest import ingest
from tasks.ingest.params import Split
from tasks.ingest.report import CorpusReport
from tasks.ingest.split import SPLITS, SplitName, Texts, split_of

# Two groups of each split.
GROUPS = {
    name: [f"G{n}" for n in range(100) if split_of(f"G{n}".encode(), ingest_params().split) == name][:2]
    for name in SPLITS
}
Row = tuple[str, str]
Raw = list[list[Row]]
# Each split has a text that nobody else holds: an empty one is refused.
OWN: list[Row] = [(f"only in {name}", groups[0]) for name, groups in GROUPS.items()]
SHARED = st.lists(
    st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from([*chain(*GROUPS.values())])), max_size=8),
    min_size=1,
    max_size=4,
)


@contextlib.contextmanager
def made_of(files: Raw) -> Iterator[CorpusReport]:
    """Makes the corpus of ``files`` of texts and their groups in a folder of its own, and goes there."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        raw = paths.RAW / "bible"
        raw.mkdir(parents=True)
        for number, content in enumerate([*files, OWN]):
            lines = (json.dumps({"text": text, "group": group}) + "\n" for text, group in content)
            (raw / f"{number}.jsonl").write_text("".join(lines))
        flat = source(document_fields=[], group_field="group")
        yield ingest(collect_params(flat), ingest_params())


def splits_of_texts() -> dict[str, SplitName]:
    found: list[tuple[str, SplitName]] = [(row["text"], split) for split in SPLITS for row in rows(split)]
    assert len(found) == len(dict(found))
    return dict(found)


def by_the_rule(files: Raw) -> dict[str, SplitName]:
    held: dict[str, set[str]] = {}
    for text, group in chain(OWN, *files):
        held.setdefault(text, set()).add(group)
    return {text: next(name for name in SPLITS if groups & set(GROUPS[name])) for text, groups in held.items()}


@settings(max_examples=30, deadline=None)
@given(SHARED)
def test_a_text_is_in_train_where_a_group_that_holds_it_is_else_in_valid_else_in_test(files: Raw) -> None:
    with made_of(files):
        assert splits_of_texts() == by_the_rule(files)
        assert all(row["group"] in GROUPS[split] for split in SPLITS for row in rows(split))


@settings(max_examples=30, deadline=None)
@given(SHARED, st.randoms(use_true_random=False))
def test_the_order_of_files_and_lines_moves_no_text_to_another_split(files: Raw, drawn: random.Random) -> None:
    other = [drawn.sample(content, len(content)) for content in drawn.sample(files, len(files))]
    with made_of(files) as report:
        before = splits_of_texts()
    with made_of(other) as report_of_other:
        assert splits_of_texts() == before
    for name in SPLITS:
        assert report.splits[name].documents == report_of_other.splits[name].documents
        assert report.splits[name].bytes == report_of_other.splits[name].bytes


@settings(max_examples=30, deadline=None)
@given(SHARED, SHARED)
def test_with_more_files_a_text_moves_towards_train_alone(files: Raw, more: Raw) -> None:
    with made_of(files):
        before = splits_of_texts()
    with made_of(more + files):
        after = splits_of_texts()
    for text, split in before.items():
        assert SPLITS.index(after[text]) <= SPLITS.index(split)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.sampled_from(SPLITS))))
def test_a_text_belongs_to_one_split_and_has_left_those_it_was_new_in(held: list[tuple[bytes, SplitName]]) -> None:
    texts = Texts()
    new = [(text, split) for text, split in held if texts.add(text, split)]
    for text in {text for text, _ in held}:
        (split,) = [name for name in SPLITS if texts.belongs(text, name)]
        # The last of the splits in which it was new is the one that is its own.
        assert [name for other, name in new if other == text][-1] == split
    moved = {split for text, split in new if not texts.belongs(text, split)}
    assert texts.left() == [name for name in SPLITS if name in moved]


def test_a_split_that_texts_have_left_has_the_bytes_of_one_they_were_never_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BYTES_PER_ROW_GROUP", 100)
    monkeypatch.setattr(tables, "BYTES_PER_PART", 300)
    (held_out, *_), (trained, *_) = GROUPS["test"], GROUPS["train"]
    texts = [f"text {number}" for number in range(200)]
    shared = [(text, trained) for text in texts[1::3]]
    with made_of([[(text, held_out) for text in texts], shared]) as report:
        moved = files_of(paths.CORPUS / "test")
    # The first text again in their place is a duplicate, and lines keep their numbers.
    never = [(texts[0] if number % 3 == 1 else text, held_out) for number, text in enumerate(texts)]
    with made_of([never, shared]) as report_of_never:
        assert files_of(paths.CORPUS / "test") == moved
    assert len(moved) > 3
    assert report.splits == report_of_never.splits
    assert report.sources[0].documents == report_of_never.sources[0].documents


def test_a_text_that_moves_is_a_duplicate_of_the_source_that_it_was_read_from_first(  # type: ignore[no-untyped-def]
    project: Path, write_jsonl
) -> None:
    (held_out, *_), (trained, *_) = GROUPS["test"], GROUPS["train"]
    talk = [{"role": "user", "content": "Is it é?"}, {"role": "assistant", "content": "It is."}]
    text = json.dumps(talk, ensure_ascii=False, separators=(",", ":"))
    flat = source(document_fields=[], group_field="group")
    talks = {**flat, "name": "talks", "text_field": None, "messages_field": "messages"}
    own = [{"text": text, "group": group} for text, group in OWN]
    write_jsonl(project / "data/raw/bible/a.jsonl", [{"text": text, "group": held_out}, *own])
    write_jsonl(project / "data/raw/talks/a.jsonl", [{"messages": talk, "group": trained}])
    report = ingest(collect_params(flat, talks), ingest_params())
    first, second = report.sources
    assert (first.documents.out, first.documents.duplicated, first.bytes.duplicated) == (3, 1, len(text.encode()))
    assert (second.documents.out, second.documents.duplicated) == (1, 0)
    assert {(row["text"], row["source"], row["is_conversation"]) for row in rows("train")} == {
        ("only in train", "bible", False),
        (text, "talks", True),
    }
    assert [(row["text"], row["id"], row["is_conversation"]) for row in rows("test")] == [
        ("only in test", "bible/a.jsonl:4", False)
    ]
    assert sorted(path.name for path in paths.CORPUS.iterdir()) == sorted(
        [*SPLITS, paths.CORPUS_REPORT.name, paths.QUARANTINE.name]
    )


@pytest.mark.parametrize(("valid", "test"), [(0.05, 0.05), (0.2, 0.1), (0.01, 0.5)])
def test_of_many_groups_each_split_gets_its_share(valid: float, test: float) -> None:
    split = Split(seed=7, valid=valid, test=test)
    names = [split_of(str(group).encode(), split) for group in range(20000)]
    for name, share in (("valid", valid), ("test", test)):
        # Four standard deviations of a binomial share.
        assert names.count(name) / 20000 == pytest.approx(share, abs=4 * (share * (1 - share) / 20000) ** 0.5)


def test_another_seed_deals_the_groups_anew() -> None:
    dealt = [
        [split_of(str(group).encode(), Split(seed=seed, valid=0.3, test=0.3)) for group in range(100)]
        for seed in (1, 2)
    ]
    assert dealt[0] != dealt[1]
