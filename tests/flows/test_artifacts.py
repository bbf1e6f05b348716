"""Reports as Prefect artifacts."""

import socket
from pathlib import Path

import pytest
from prefect.client import base
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import artifacts
from flows.graph import Stage
from tasks.progress import Event


def test_a_table_has_a_row_for_each_scalar_named_by_its_path() -> None:
    content = {"tokens": 1234567, "loss": {"value": 0.123456789, "ok": True}, "splits": ["a|b", None]}
    assert artifacts.table(content).splitlines()[2:] == [
        "| tokens | 1,234,567 |",
        "| loss.value | 0.123457 |",
        "| loss.ok | true |",
        "| splits.0 | a\\|b |",
        "| splits.1 | null |",
    ]


def test_a_long_table_says_how_much_it_leaves_out() -> None:
    lines = artifacts.table(list(range(205))).splitlines()
    assert lines[-1] == "| … | 5 more in the file |"
    assert len(lines) == 2 + 200 + 1


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (["data/corpus"], ["data/corpus/report.json"]),
        (["models/float", "models/train.json", "models/curve.csv"], ["models/train.json"]),
        (["models/int8"], ["models/int8/audit.json"]),
        (["models/card"], ["models/card/README.md"]),
        (["elsewhere"], []),
    ],
)
def test_the_reports_of_a_stage_are_found_among_its_outputs(outputs: list[str], expected: list[str]) -> None:
    stage = Stage("any", "", (), (), tuple(map(Path, outputs)))
    assert list(map(str, artifacts.reports(stage))) == expected


def test_keys_are_such_as_prefect_accepts() -> None:
    assert artifacts.key("sub/dvc.yaml:Train@x_1") == "sub-dvc-yaml-train-x-1"


def test_progress_is_shown_while_a_stage_works_now_and_then_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, shown = [100.0], list[float]()
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda percent, *_: shown.append(percent) or "made")
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda _, percent, __: shown.append(percent))
    monkeypatch.setattr(artifacts.time, "monotonic", lambda: now[0])
    artifact = artifacts.ProgressArtifact("train")
    for done, seconds in ((1, 0.1), (2, 2.1), (3, 0.1), (4, 2.1), (5, 0.1), (6, 0.1), (7, 2.1), (8, 0.1)):
        artifact.update(Event("train", "steps", done, 8, "steps", 1.0))
        now[0] += seconds
    assert shown == [12.5, 37.5, 62.5, 100.0]


def test_a_server_that_fails_costs_one_call_a_minute_and_shows_progress_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked, shown = [100.0], list[float](), list[float]()

    def create(percent: float, *_: object) -> str:
        asked.append(now[0])
        if now[0] < 200:
            raise ConnectionError
        shown.append(percent)
        return "made"

    monkeypatch.setattr(artifacts, "create_progress_artifact", create)
    monkeypatch.setattr(artifacts.time, "monotonic", lambda: now[0])
    artifact = artifacts.ProgressArtifact("train")
    for done in range(1, 8):
        artifact.update(Event("train", "steps", done, 10, "steps", 1.0))
        now[0] += 20.0
    assert asked == [100.0, 160.0, 220.0]
    assert shown == [70.0]


def test_nobody_waits_for_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        gone = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
    slept = list[float]()
    monkeypatch.setattr(base.time, "sleep", slept.append)
    with temporary_settings({PREFECT_API_URL: gone}):
        artifacts.ProgressArtifact("train").update(Event("train", "steps", 1, 10, "steps", 1.0))
    # The transport tries some times by itself, in seconds; Prefect would in a minute.
    assert sum(slept) < 10
