"""What a user, or the world, got wrong, through the whole command: one line that says so, and never a traceback."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chain import Chain

if TYPE_CHECKING:
    from conftest import Reference


def refused(chain: Chain) -> str:
    """Runs a project that must be refused before anything runs; returns the one line of it."""
    before = chain.version()
    ended = chain.overnight("run")
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    assert chain.version() == before
    return ended.complaint()


def fails(chain: Chain, stage: str, *arguments: str) -> str:
    """Runs a project in which ``stage`` must fail and nothing after it starts; returns the one line of it."""
    ended = chain.overnight("run", *arguments)
    assert ended.code == 2, ended.err
    outcomes = list(ended.outcomes().items())
    place = outcomes.index((stage, "failed"))
    assert {outcome for _, outcome in outcomes[place + 1 :]} == {"skipped"}
    assert ended.complaint().startswith(f"{stage}: ")
    return ended.complaint()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("train.lerning_rate", 0.1, "params.yaml: train.lerning_rate: unknown key"),
        ("train.learning_rate", -0.1, "params.yaml: train.learning_rate: input should be greater than 0, found -0.1"),
        ("train.micro_batch", 3, "params.yaml: train: global_batch 8 is not a multiple of micro_batch 3"),
        ("flow.retries", {"trian": 2}, "params.yaml: flow.retries: there is no stage 'trian'"),
    ],
)
def test_parameters_that_do_not_fit_are_named(finished: Chain, path: str, value: object, said: str) -> None:
    finished.set(path, value)
    assert said in refused(finished)


@pytest.mark.parametrize(("folder", "cure"), [(".git", "git init"), (".dvc", "dvc init")])
def test_a_missing_repository_is_named_with_its_cure(finished: Chain, folder: str, cure: str) -> None:
    shutil.rmtree(finished.root / folder)
    assert cure in refused(finished)


def test_a_missing_source_is_named(finished: Chain, server: str) -> None:
    shutil.rmtree(finished.root / "texts")
    assert "texts: no such file" in fails(finished.at(server), "collect")


def test_an_empty_corpus_is_named(finished: Chain, server: str) -> None:
    for file in (finished.root / "texts").iterdir():
        file.write_text('{"text": " ", "group": "book 1"}\n')
    finished.set("ingest.max_reject_rate", 1.0)
    assert "data/raw: the corpus is empty" in fails(finished.at(server), "ingest")
    assert not (finished.root / "data/corpus").exists()


def test_a_corpus_smaller_than_one_batch_is_named(finished: Chain, server: str) -> None:
    finished.set("train.global_batch", 100000)
    said = fails(finished.at(server), "train")
    assert "data/shards: the train split holds" in said
    assert "100000 are needed" in said
    assert "lower train.seq_len or train.global_batch" in said


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_shard_is_named_before_it_is_read(finished: Chain, server: str) -> None:
    flip_a_byte(finished.root / "data/shards/train-00000.h5")
    finished.set("train.learning_rate", 0.002)
    # Whoever skips the stage that would mend it gets to hear of it.
    assert "data/shards/train-00000.h5: damaged" in fails(finished.at(server), "train", "--from", "train")


def test_a_damaged_shard_is_mended_by_the_next_run(finished: Chain, server: str, reference: "Reference") -> None:
    flip_a_byte(finished.root / "data/shards/train-00000.h5")
    assert "shard: stale: data/shards modified" in finished.overnight("status").out.splitlines()
    ended = finished.at(server).overnight("run")
    assert ended.code == 0, ended.err
    assert finished.version() == reference.version
