"""A shard that a disk has damaged: a run mends it, or says so in one line.

What a user got wrong is told before anything runs (``tests/flows/test_cli.py``), or by a stage (``tests/tasks``), whose
line a run passes on (``tests/flows/test_run.py``).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from chain import Chain

if TYPE_CHECKING:
    from conftest import Reference


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_it_is_named_before_it_is_read(finished: Chain, server: str) -> None:
    flip_a_byte(finished.root / "data/shards/train-00000.h5")
    finished.set("train.learning_rate", 0.002)
    # Whoever skips the stage that would mend it gets to hear of it.
    ended = finished.at(server).overnight("run", "--from", "train")
    assert ended.code == 2, ended.err
    outcomes = list(ended.outcomes().items())
    place = outcomes.index(("train", "failed"))
    assert {outcome for _, outcome in outcomes[place + 1 :]} == {"skipped"}
    assert ended.complaint().startswith("train: data/shards/train-00000.h5: damaged")


def test_it_is_mended_by_the_next_run(finished: Chain, server: str, reference: "Reference") -> None:
    flip_a_byte(finished.root / "data/shards/train-00000.h5")
    assert "shard: stale: data/shards modified" in finished.overnight("status").out.splitlines()
    ended = finished.at(server).overnight("run")
    assert ended.code == 0, ended.err
    assert finished.version() == reference.version
