"""The records of runs, and which one `overnight rerun` goes on with."""

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import history, runs
from flows.rerun import choose
from flows.runs import Run
from flows.watch import StageRun
from tasks.errors import TryAgain, UserMistake

NOW = datetime.now().astimezone()
# The largest number that Linux gives a process, and never in a test's life.
NOBODY = 4194304


def a_run(name: str, state: str, **known: object) -> Run:
    fields = {"pid": NOBODY, "started": NOW - timedelta(hours=1), "since": NOW - timedelta(hours=1), "ended": NOW}
    return Run.model_validate({"run": name, "state": state, **fields, **known})


def test_a_run_that_ends_well_is_listed_with_its_version(tmp_path: Path) -> None:
    with runs.attempt(tmp_path, "a", night=True) as record:
        record.began("train")
        record.ended(StageRun("train", "ran", 12.0))
        assert [(run.condition, run.last_stage.stage) for run in runs.read(tmp_path) if run.last_stage] == [
            ("running", "train")
        ]
        record.end("completed", "v1.0.0 is in production", "v1.0.0")
    (run,) = runs.read(tmp_path)
    assert (run.condition, run.version, run.can_go_on, run.night) == ("completed", "v1.0.0", False, True)


def test_a_run_that_is_stopped_says_where(tmp_path: Path) -> None:
    def stopped() -> None:
        with runs.attempt(tmp_path, "a") as record:
            record.began("train")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    (run,) = runs.read(tmp_path)
    assert (run.condition, run.reason, run.can_go_on) == ("stopped", "interrupted (Ctrl-C) at train", True)


def test_after_the_clock_went_back_the_last_run_is_still_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.begin(tmp_path, "20260101-030000-evening").end("completed")
    monkeypatch.setattr(runs, "_now", lambda: NOW - timedelta(hours=2))
    runs.begin(tmp_path, "20260101-010000-morning").end("failed")
    runs.begin(tmp_path, "20260101-030000-evening").end("completed")
    known = runs.read(tmp_path)
    assert [run.run for run in known] == ["20260101-030000-evening", "20260101-010000-morning"]
    assert choose(known).run == "20260101-010000-morning"


def test_of_a_run_that_ends_before_it_began_by_the_clock_nobody_knows_the_duration() -> None:
    assert history.row(a_run("a", "completed")).duration == "1:00:00"
    assert history.row(a_run("a", "completed", ended=NOW - timedelta(hours=2))).duration == "?"
    assert a_run("a", "running", alive=True, started=NOW + timedelta(hours=2), ended=None).seconds is None


def test_the_run_at_work_last_is_told_from_older_ones_and_from_nights_that_were_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs.last_at_work(tmp_path) is None
    runs.begin(tmp_path, "a").end("failed")
    runs.begin(tmp_path, "b").end("failed")
    runs.begin(tmp_path, "a").end("failed")
    assert runs.last_at_work(tmp_path) == runs.find(tmp_path, "a")
    monkeypatch.setattr(runs, "_now", lambda: NOW - timedelta(hours=2))
    runs.begin(tmp_path, "b").end("failed")
    runs.begin(tmp_path, "late").end("skipped")
    assert runs.last_at_work(tmp_path) == runs.find(tmp_path, "b")


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit])
def test_a_run_that_prefect_ends_is_told_without_pythons_words(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), runs.attempt(tmp_path, "a"):
        raise error
    (run,) = runs.read(tmp_path)
    assert (run.condition, run.reason) == ("stopped", "told to end")


def test_a_run_whose_process_is_gone_counts_as_killed() -> None:
    assert a_run("a", "running", ended=None).condition == "killed"


def test_a_run_lives_as_long_as_its_process_whatever_number_that_has_where_one_asks(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, subprocess, sys
from flows import history, runs
# In a container every night is process 1, or nearly so.
os.getpid = lambda: {NOBODY}
with runs.attempt(pathlib.Path({str(tmp_path)!r}), "a"):
    subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print("at work", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    assert child.stdout
    assert child.stdout.readline() == "at work\n"
    (run,) = runs.read(tmp_path)
    assert (run.pid, run.alive, run.condition) == (NOBODY, True, "running")
    # Not with what it had started: that is no sign of life.
    child.kill()
    child.wait()
    assert runs.find(tmp_path, "a").condition == "killed"
    os.killpg(child.pid, signal.SIGKILL)


def test_the_next_attempt_knows_what_was_finished_and_what_was_begun(tmp_path: Path) -> None:
    for finished, begun in [("ingest", "shard"), ("shard", "train")]:
        record = runs.begin(tmp_path, "a", force=True)
        record.ended(StageRun(finished, "ran", 1.0))
        record.began(begun)
    assert record.resumed == runs.Resumed(frozenset({"ingest"}), frozenset({"shard"}))
    third = runs.begin(tmp_path, "a", force=True)
    assert third.resumed == runs.Resumed(frozenset({"ingest", "shard"}), frozenset({"train"}))
    # The fourth dies before it comes to the training, whose checkpoints are this run's own all the same.
    third.began("collect")
    assert "train" in runs.begin(tmp_path, "a").resumed.begun
    # What the run was asked to do is not forgotten.
    assert runs.recall(tmp_path, "a").force  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("state", "asked"), [("failed", {"from_stage": "train", "force": True}), ("completed", {"force": False})]
)
def test_who_asks_for_something_else_or_for_a_finished_run_gets_it_anew(
    tmp_path: Path, state: runs.State, asked: dict[str, object]
) -> None:
    record = runs.begin(tmp_path, "a", force=False)
    record.ended(StageRun("train", "ran", 1.0))
    record.ended(StageRun("quantize", "failed", 1.0))
    record.end(state)
    assert runs.begin(tmp_path, "a", **asked).resumed == runs.Resumed()


def test_what_stops_a_run_outside_its_stages_is_its_reason(tmp_path: Path) -> None:
    with pytest.raises(TryAgain), runs.attempt(tmp_path, "a"):
        raise TryAgain("Prefect's server did not start; its log is server.log.")
    (run,) = runs.read(tmp_path)
    assert (run.condition, run.reason) == ("failed", "Prefect's server did not start; its log is server.log.")


def test_a_run_whose_runner_was_killed_says_so(tmp_path: Path) -> None:
    def stopped() -> None:
        with runs.attempt(tmp_path, "a") as record:
            record.began("publish")
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        stopped()
    (run,) = runs.read(tmp_path)
    assert (run.condition, run.reason) == ("stopped", "whoever ran it was gone at publish")


def test_how_a_run_ended_on_a_full_disk_is_written_where_room_was_kept(tmp_path: Path, small_disk: Any) -> None:
    small_disk(tmp_path / "disk", 64)
    root = tmp_path / "disk"
    with runs.attempt(root, "a") as record:
        with (root / "full").open("wb", buffering=0) as full, contextlib.suppress(OSError):
            while True:
                full.write(bytes(1024))
        record.ended(StageRun("train", "failed", 1.0, "the disk is full"))
        record.end("failed", "train: the disk is full")
    (run,) = runs.read(root)
    assert (run.condition, run.reason, run.stages[0].outcome) == ("failed", "train: the disk is full", "failed")


def test_the_room_for_the_end_of_a_run_goes_with_it(tmp_path: Path) -> None:
    room = tmp_path / runs.RUNS / ".a.room"
    record = runs.begin(tmp_path, "a")
    assert room.exists()
    record.end("completed")
    assert not room.exists()
    # One that died, went on, and died once more.
    runs.begin(tmp_path, "a")
    runs.begin(tmp_path, "a")
    assert room.stat().st_size == 16 * 1024
    # For which there was no room.
    room.write_bytes(b"")
    runs.begin(tmp_path, "a")
    assert room.stat().st_size == 16 * 1024
    runs.bury(tmp_path, runs.find(tmp_path, "a"))
    assert not room.exists()


def test_a_name_s_beginning_is_enough_when_only_one_begins_so(tmp_path: Path) -> None:
    for name in ("20260101-a", "20260101-b", "20260102-c"):
        runs.begin(tmp_path, name)
    assert runs.find(tmp_path, "20260102").run == "20260102-c"
    with pytest.raises(UserMistake, match="beginning of 2 runs"):
        runs.find(tmp_path, "20260101")
    with pytest.raises(UserMistake, match="the last ones are 20260101-a, 20260101-b, 20260102-c"):
        runs.find(tmp_path, "2025")


def test_a_damaged_record_hides_no_other(tmp_path: Path) -> None:
    runs.begin(tmp_path, "a")
    (tmp_path / runs.RUNS / "b.json").write_text("{")
    assert [run.run for run in runs.read(tmp_path)] == ["a"]


@pytest.mark.parametrize(
    ("states", "chosen"),
    [
        (["completed", "failed"], 1),
        (["failed", "skipped"], 0),
        (["stopped"], 0),
        (["running"], 0),
    ],
)
def test_the_last_run_that_did_not_end_is_gone_on_with(states: list[str], chosen: int) -> None:
    known = tuple(a_run(str(index), state) for index, state in enumerate(states))
    assert choose(known).run == str(chosen)


def test_a_finished_run_is_chosen_when_stages_of_it_are_to_be_repeated() -> None:
    known = (a_run("0", "completed"), a_run("1", "skipped"))
    assert choose(known, finished_too=True).run == "0"


@pytest.mark.parametrize(
    ("states", "said"), [([], "no run yet"), (["failed", "completed"], "the last run, 1, is completed")]
)
def test_nothing_to_go_on_with_is_told(states: list[str], said: str) -> None:
    with pytest.raises(UserMistake, match=said):
        choose(tuple(a_run(str(index), state) for index, state in enumerate(states)))


def test_the_list_says_why(tmp_path: Path) -> None:
    failed = a_run(
        "a", "failed", reason="train: the gradient is not finite", stages=[{"stage": "train", "outcome": "failed"}]
    )
    killed = a_run("b", "running", ended=None)
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    history.show(console, [failed, killed])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split("\t")[2:] == ["failed", "train", "1:00:00", "", "train: the gradient is not finite"]
    assert "died without a word; `overnight rerun b` goes on with it" in lines[1]
