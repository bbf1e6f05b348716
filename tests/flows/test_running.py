"""What a run at work says of itself, what is left of it when it dies, and what the status makes of both."""

import contextlib
import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from flows import dvc, failures, lock, running, runs, status, stopped
from flows.failures import Failure
from flows.graph import Stage, in_order
from flows.watch import StageRun
from tasks import inputs
from tasks.params import Params, read
from tasks.progress import Event

REPOSITORY = Path(__file__).parents[2]
AT_WORK = Event("train", "training", 16, 30, "steps", 2.0, {"loss": 1.0})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("params.yaml", "requirements.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


@pytest.fixture
def params(root: Path) -> Params:
    return read(root / "params.yaml")


def lines(root: Path, params: Params) -> list[str]:
    console = Console(force_terminal=False, width=40)
    with console.capture() as capture:
        status.show(console, status.read(root, params))
    return capture.get().splitlines()


def begin(root: Path, run: str) -> running.Record:
    record = running.Record(root, run)
    record.plan(["collect", "ingest", "train", "card"])
    record.began("collect")
    record.ended(StageRun("collect", "cached", 0.1))
    record.began("ingest")
    record.ended(StageRun("ingest", "ran", 2.0))
    record.began("train")
    return record


def test_the_status_of_a_run_at_work_asks_the_run_and_not_dvc(
    root: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_SECONDS_BETWEEN_WRITES", 0.0)
    # No dvc.yaml and no .dvc are here: whoever asked DVC would fail.
    with lock.hold(root, "20260101-000000-7"):
        begin(root, "20260101-000000-7").event(AT_WORK)
        found = lines(root, params)
    assert found[:2] == ["collect: up to date", "ingest: up to date"]
    assert found[2].startswith("train: running: since ")
    assert ", training 16/30 steps, 7 s left (run 20260101-000000-7, process " in found[2]
    assert found[3:] == ["card: waiting"]


def test_a_retry_and_a_failure_are_told_while_the_run_goes_on(root: Path, params: Params) -> None:
    with lock.hold(root, "a"):
        record = begin(root, "a")
        record.retrying("train", "rank 1 was killed", 2, 5.0)
        assert "train: running: rank 1 was killed; attempt 2; since" in lines(root, params)[2]
        record.ended(StageRun("train", "failed", 1.0, "rank 1 was killed"))
        record.began("card")
        record.ended(StageRun("card", "skipped", 0.0, "not started, because of train"))
        assert lines(root, params)[2:] == [
            "train: failed: rank 1 was killed",
            "card: skipped: not started, because of train",
        ]


def test_events_are_written_once_a_second_and_notices_not_at_all(root: Path) -> None:
    record = begin(root, "a")
    record.event(AT_WORK)
    assert json.loads((root / running.RUNNING).read_text())["stages"][2]["progress"] == ""
    record.ended(StageRun("train", "ran", 1.0))
    record.event(Event("train", "training", 30, 30, "steps", 2.0, notice="the clock was set"))
    assert "clock" not in (root / running.RUNNING).read_text()


def test_nothing_is_left_of_a_run_that_came_to_its_end(root: Path, params: Params) -> None:
    with running.record(root, "a") as record:
        record.plan(["train"])
        record.began("train")
        record.ended(StageRun("train", "failed", 1.0, "too small"))
    assert running.read(root) is None
    assert stopped.recall(root, params) == {}


def test_a_run_that_died_says_in_which_stage_it_was(root: Path, params: Params) -> None:
    def die() -> None:
        with running.record(root, "a") as record:
            record.plan(["train", "card"])
            record.began("train")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        die()
    assert stopped.recall(root, params) == {"train": "before its first checkpoint (run a)"}
    (root / running.RUNNING).write_text("{")
    assert stopped.recall(root, params) == {}


def test_checkpoints_say_where_a_training_stopped_as_long_as_they_fit(root: Path, params: Params) -> None:
    begin(root, "a")
    (root / "data/shards").mkdir(parents=True)
    (root / "data/shards/manifest.json").write_text("{}")
    key = inputs.key("train", params.train, [root / "data/shards/manifest.json"])
    folder = root / ".overnight/checkpoints/train" / key
    folder.mkdir(parents=True)
    for step in (120, 80):
        (folder / f"step-{step:09d}-{'0' * 32}.pt").touch()
    assert stopped.recall(root, params) == {"train": f"at step 120 of {params.train.steps}"}
    other = params.model_copy(update={"train": params.train.model_copy(update={"learning_rate": 0.5})})
    assert stopped.recall(root, other) == {}


def test_where_a_night_stopped_is_read_from_its_worktree(
    root: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What `overnight status` calls a failure, a checkpoint, and that a stage is stale, without DVC.
    monkeypatch.setattr(dvc, "graph", lambda root: in_order([Stage(one, "", (), (), ()) for one in ("train", "card")]))
    stale = {name: dvc.Stale((), never_run=True) for name in ("train", "card")}
    monkeypatch.setattr(dvc, "changes", lambda root: dvc.Changes(stale, {}))
    worktree = Path(".overnight/worktrees/night")
    night = root / worktree
    (night / "data/shards").mkdir(parents=True)
    (night / "data/shards/manifest.json").write_text("{}")
    for name in ("params.yaml", "requirements.lock"):
        shutil.copy(root / name, night)
    with contextlib.chdir(night):
        key = inputs.key("train", params.train, [Path("data/shards/manifest.json")])
    (night / ".overnight/checkpoints/train" / key).mkdir(parents=True)
    (night / ".overnight/checkpoints/train" / key / f"step-000000200-{'0' * 32}.pt").touch()
    log, now = Path("card.log"), datetime.now().astimezone()
    failures.remember(night, Failure(stage="card", run="night", at=now, exit_code=1, message="no room", log=log))
    begin(root, "night").began("train")
    other = params.model_copy(update={"train": params.train.model_copy(update={"learning_rate": 0.5})})
    told = [f"train: stopped: at step 200 of {params.train.steps:,} (run night)", "card: failed: no room"]
    runs.begin(root, "night", night=True, worktree=worktree)
    assert lines(root, other)[1:] == told
    # It is over as soon as somebody runs by hand.
    runs.begin(root, "later")
    assert lines(root, other)[2] == "card: never run"
