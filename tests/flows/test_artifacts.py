"""Reports as Prefect artifacts."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client import base
from prefect.context import SyncClientContext
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED, temporary_settings

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


def show_by(monkeypatch: pytest.MonkeyPatch, show: Callable[[float], object]) -> list[float]:
    """Has ``show`` take the percentages in place of a server; returns the time, in seconds, which stands still.

    Behind that stands how many clients are open.
    """
    now = [100.0, 0]

    @contextlib.contextmanager
    def client(*_: object, **__: object) -> Iterator[Any]:
        now[1] += 1
        yield SimpleNamespace(
            create_artifact=lambda artifact: show(artifact.data) or SimpleNamespace(id="made"),
            update_artifact=lambda _, artifact: show(artifact.data),
        )
        now[1] -= 1

    monkeypatch.setattr(artifacts, "get_client", client)
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_progress_is_shown_while_a_stage_works_now_and_then_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = list[float]()
    now = show_by(monkeypatch, shown.append)
    artifact = artifacts.ProgressArtifact("train")
    for done, seconds in ((1, 0.1), (2, 2.1), (3, 0.1), (4, 2.1), (5, 0.1), (6, 0.1), (7, 2.1), (8, 0.1)):
        artifact.update(Event("train", "steps", done, 8, "steps", 1.0))
        now[0] += seconds
        # One for all: to make a client takes longer than to ask.
        assert now[1] == 1
    assert shown == [12.5, 37.5, 62.5, 100.0]
    artifact.close()
    assert now[1] == 0


def test_a_server_that_fails_costs_one_call_a_minute_and_shows_progress_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, shown = list[float](), list[float]()

    def show(percent: float) -> None:
        asked.append(now[0])
        if now[0] < 200:
            # As long as a machine that is off may take not to answer.
            now[0] += 30.0
            raise ConnectionError
        shown.append(percent)

    now = show_by(monkeypatch, show)
    artifact = artifacts.ProgressArtifact("train")
    for done in range(1, 8):
        artifact.update(Event("train", "steps", done, 10, "steps", 1.0))
        now[0] += 20.0
    assert asked == [100.0, 190.0, 280.0]
    assert shown == [70.0]


def test_in_a_run_nobody_waits_long_for_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_SECONDS_TO_ANSWER", 0.1)
    slept = list[float]()
    monkeypatch.setattr(base, "time", SimpleNamespace(sleep=slept.append))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hangs = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        settings = {PREFECT_API_URL: hangs, PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False}
        # As Prefect's engine does; its client waits for a minute.
        with temporary_settings(settings), SyncClientContext.get_or_create():
            begun = time.monotonic()
            artifacts.ProgressArtifact("train").update(Event("train", "steps", 1, 10, "steps", 1.0))
            assert time.monotonic() - begun < 30
    assert slept == []
