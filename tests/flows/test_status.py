"""The status of each stage, as a table of cases."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from flows.dvc import Change, Changes, Stale
from flows.failures import Failure, forget, recall, remember
from flows.graph import Stage, in_order
from flows.status import Condition, StageStatus, assess, show
from tasks import paths

GRAPH = in_order([
    Stage("ingest", "", (), (Path("data/raw"),), ()),
    Stage("train", "", ("ingest",), (), ()),
    Stage("card", "", ("train",), (), ()),
])  # fmt: skip
RATE = Change("parameter", "params.yaml: train.learning_rate", "modified")
MISSING = Change("output", "models/float", "deleted")
FAILURE = Failure(
    stage="train", run="1", at=datetime(2026, 1, 1, tzinfo=UTC), exit_code=2, message="too small", log=Path("log")
)
RAW = {"data/raw.dvc": Stale((Change("output", "data/raw", "modified"),), never_run=False)}


def stale(*changes: Change, never_run: bool = False) -> Stale:
    return Stale(changes, never_run)


@pytest.mark.parametrize(
    ("stages", "data", "failed", "expected"),
    [
        ({}, {}, {}, ["collect: up to date", "ingest: up to date", "train: up to date", "card: up to date"]),
        (
            {"train": stale(RATE, MISSING)},
            {},
            {},
            [
                "collect: up to date",
                "ingest: up to date",
                "train: stale: params.yaml: train.learning_rate modified; models/float deleted",
                "card: stale: train is stale",
            ],
        ),
        (
            {"train": stale(MISSING, never_run=True), "card": stale(MISSING, never_run=True)},
            {},
            {"train": FAILURE},
            ["collect: up to date", "ingest: up to date", "train: failed: too small", "card: never run"],
        ),
        # What failed once and is up to date now (dvc repro by hand) did not fail.
        (
            {},
            {},
            {"train": FAILURE},
            ["collect: up to date", "ingest: up to date", "train: up to date", "card: up to date"],
        ),
        (
            {"ingest": stale(Change("dependency", "data/raw", "modified"))},
            RAW,
            {},
            [
                "collect: stale: data/raw modified",
                "ingest: stale: data/raw modified",
                "train: stale: ingest is stale",
                "card: stale: train is stale",
            ],
        ),
    ],
)
def test_status(
    stages: dict[str, Stale], data: dict[str, Stale], failed: dict[str, Failure], expected: list[str]
) -> None:
    statuses = assess(GRAPH, Changes(stages, data), failed, {}, collected=True)
    console = Console(file=None, force_terminal=False, width=40)
    with console.capture() as capture:
        show(console, statuses)
    assert capture.get().splitlines() == expected


def test_what_a_stage_is_brought_has_a_row_where_it_was_refused() -> None:
    graph = in_order([
        Stage("ingest", "", (), (Path("data/raw"),), ()),
        Stage("train", "", ("ingest",), (paths.INIT,), ()),
        Stage("evaluate", "", ("train",), (paths.CHAMPION,), ()),
    ])  # fmt: skip
    failed = {"init": FAILURE.model_copy(update={"stage": "init", "message": "no such layer"})}
    found = assess(graph, Changes({"train": stale(RATE)}, {}), failed, {}, collected=True)
    assert [(one.stage, one.condition) for one in found] == [
        ("collect", Condition.UP_TO_DATE),
        ("init", Condition.FAILED),
        ("ingest", Condition.UP_TO_DATE),
        ("train", Condition.STALE),
        ("evaluate", Condition.STALE),
    ]
    assert found[1].reasons == ("no such layer",)
    assert "init" not in [one.stage for one in assess(graph, Changes({}, {}), failed, {}, collected=True)]
    # The model in production is read by what comes after a training.
    failed = {"champion": FAILURE.model_copy(update={"stage": "champion"})}
    for stale_one, told in (("train", True), ("evaluate", True), ("", False)):
        changes = Changes({stale_one: stale(RATE)} if stale_one else {}, {})
        rows = [one.stage for one in assess(graph, changes, failed, {}, collected=True)]
        assert ("champion" in rows) == told, stale_one


def test_a_stopped_stage_says_where_and_what_had_changed() -> None:
    changes = Changes({"train": stale(RATE, MISSING), "card": stale(MISSING)}, {})
    statuses = assess(GRAPH, changes, {}, {"train": "at step 16 of 30", "card": "before its end"}, collected=True)
    assert statuses[2] == StageStatus("train", Condition.STOPPED, ("at step 16 of 30", str(RATE)))
    # What it reads will be made anew, so it will not go on from there.
    assert statuses[3].condition == Condition.STALE
    never = assess(GRAPH, Changes({"train": stale(RATE, never_run=True)}, {}), {}, {"train": "at step 16 of 30"}, True)
    assert never[2] == StageStatus("train", Condition.STOPPED, ("at step 16 of 30",))
    failed = assess(GRAPH, changes, {"train": FAILURE}, {"train": "at step 16 of 30"}, True)
    assert failed[2] == StageStatus("train", Condition.FAILED, ("too small", "stopped at step 16 of 30"))


def test_nothing_was_ever_collected() -> None:
    assert assess(GRAPH, Changes({}, {}), {}, {}, collected=False)[0] == StageStatus("collect", Condition.NEVER_RUN)
    collect, *rest = assess(GRAPH, Changes({}, {}), {}, {}, collected=True, uncollected=["talks"])
    assert collect == StageStatus("collect", Condition.STALE, ("nothing of source 'talks' is there",))
    # What the stages read of it is not there yet, so they are as they were.
    assert {one.condition for one in rest} == {Condition.UP_TO_DATE}


def test_a_terminal_shows_the_first_reasons_and_counts_the_others() -> None:
    reasons = tuple(f"file{index} modified" for index in range(7))
    console = Console(force_terminal=True, width=100)
    with console.capture() as capture:
        show(console, [StageStatus("train", Condition.STALE, reasons)])
    assert "file3 modified" in capture.get()
    assert "file4" not in capture.get()
    assert "3 more" in capture.get()


def test_a_failure_is_remembered_until_it_is_forgotten(tmp_path: Path) -> None:
    remember(tmp_path, FAILURE)
    assert recall(tmp_path) == {"train": FAILURE}
    forget(tmp_path, "train")
    forget(tmp_path, "train")
    assert recall(tmp_path) == {}


def test_a_damaged_record_is_no_reason_to_refuse_the_status(tmp_path: Path) -> None:
    remember(tmp_path, FAILURE)
    (tmp_path / ".overnight/failed/other.json").write_text("{")
    assert recall(tmp_path) == {"train": FAILURE}
