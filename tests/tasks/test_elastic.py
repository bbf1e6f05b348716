"""A training that goes on with another number of processes: two, one, two."""

import json
import time
from collections import defaultdict
from pathlib import Path

import disturb
import forked
import pytest
import tiny

from tasks.errors import EXIT_STOPPED
from tasks.order import batch_of_rank
from tasks.section import read_section
from tasks.shards import Shards, read_manifest
from tasks.train.params import TrainParams

LINKS = Path(".overnight/measurements/train-communication.json")


def write(project: Path, world_size: int) -> None:
    tiny.write_params(
        project,
        train__steps=60,
        train__elastic=True,
        train__precision="fp32",
        train__world_size=world_size,
        train__checkpoint_every=1000,
    )


def stop_after(project: Path, world_size: int, steps: int) -> None:
    """Trains until ``steps`` steps are done, and then tells it to end."""
    write(project, world_size)
    ranks = forked.start([project] * world_size, project / "log", disturb.record)
    deadline = time.monotonic() + 60
    while not (project / "seen-0").exists() or len((project / "seen-0").read_text().splitlines()) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ranks[0].terminate()
    assert forked.end(ranks) == [EXIT_STOPPED] * world_size, (project / "log").read_text()


def test_no_window_is_lost_or_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_shards(tmp_path)
    stop_after(tmp_path, 2, 3)
    (link,) = json.loads(LINKS.read_text())
    assert (link["axis"], link["processes"]) == ("replicate", 2)
    assert 0 < link["latency_us"] < 1e6
    assert 0 < link["bandwidth_gb_s"] < 1000
    assert "train     replicate x2: all-reduce " in (tmp_path / "log").read_text()
    stop_after(tmp_path, 1, 20)
    # One process reaches nobody.
    assert not LINKS.exists()
    write(tmp_path, 2)
    assert forked.end(forked.start([tmp_path] * 2, tmp_path / "log", disturb.record)) == [0, 0]
    assert json.loads(Path("models/train.json").read_text())["processes_in_turn"] == [2, 1, 2]

    seen: dict[int, list[int]] = defaultdict(list)
    for file in tmp_path.glob("seen-*"):
        for step, windows in map(json.loads, file.open()):
            seen[step] += windows
    params = read_section("train", TrainParams)
    count = len(Shards(Path("data/shards"), read_manifest(), "train").reader(params.seq_len))
    expected = {
        step: batch_of_rank(step, count, params.seed, params.global_batch, params.micro_batch, 0, 1).flatten().tolist()
        for step in range(60)
    }
    assert {step: sorted(windows) for step, windows in seen.items()} == {
        step: sorted(windows) for step, windows in expected.items()
    }

    # It learned the same, but for the order of sums.
    calm = tmp_path / "calm"
    calm.mkdir()
    tiny.write_shards(calm)
    write(calm, 1)
    assert forked.end(forked.start([calm], tmp_path / "log")) == [0]
    losses = [json.loads((place / "models/train.json").read_text())["valid_loss"] for place in (tmp_path, calm)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert "processes_in_turn" not in json.loads((calm / "models/train.json").read_text())
