"""What progress says: to people in lines and bars, to an orchestrator in events."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tasks.progress import EVENTS_VARIABLE, Bar, Event, Lines, Progress, progress


def lines_of(*events: Event) -> list[str]:
    said: list[str] = []
    lines = Lines(said.append, every=0)
    for event in events:
        lines.show(event)
    return said


def test_large_numbers_are_whole_and_small_ones_are_not() -> None:
    numbers = {"rejected": 31102, "tokens": 31102.0, "loss": 3.21449, "learning_rate": 0.0003, "skipped": 0}
    event = Event("ingest", "read", 1234567, 7654321, "bytes", 31102.4, numbers)
    assert event.describe_numbers() == (
        "31,102 bytes/s  rejected 31,102  tokens 31,102  loss 3.214  learning rate 0.0003  skipped 0"
    )
    first, second = lines_of(event, event)
    assert first == f"ingest    read 1,234,567/7,654,321 bytes  {event.describe_numbers()}"
    assert second == f"{first}  206 s left"


def test_how_long_a_step_takes_is_not_told_from_its_first_report() -> None:
    reading = Event("push", "reading", 1, 10, "objects", 0.5)
    # As where the first object takes seconds, in which a connection is made.
    later = [dataclasses.replace(reading, done=2, rate=4.0), dataclasses.replace(reading, step="more", rate=4.0)]
    ends = [line.rpartition("  ")[2] for line in lines_of(reading, *later)]
    assert ends == ["0.50 objects/s", "2 s left", "4.00 objects/s"]


def test_a_bar_separates_thousands_too() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    bar = Bar(console)
    bar.show(Event("ingest", "read", 1234567, 7654321, "bytes", 31102.4, {}))
    bar.close()
    assert "1,234,567/7,654,321" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_bar_leaves_out_the_numbers_that_do_not_fit() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    bar = Bar(console)
    event = Event("train", "training", 1, 2, "steps", 3, {"loss": 3.214, "valid_loss": 3.3, "grad_norm": 0.5})
    bar.show(event)
    bar.close()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "valid loss 3.3" in shown
    assert "grad norm" not in shown
    assert "grad norm 0.5" in lines_of(event)[0]


def test_of_nothing_there_is_no_progress_and_a_rate_is_never_negative() -> None:
    said: list[str] = []
    shown = Progress("ingest", Lines(said.append, every=0))
    shown.begin("read")
    shown.update(0, 0, "bytes")
    shown.update(-1, 0, "bytes")
    shown.update(0, 70, "bytes")
    assert said == []
    shown.begin("read", done=50)
    shown.update(40, 40, "bytes")
    assert said == ["ingest    read 40/40 bytes  0.00 bytes/s"]


@pytest.mark.parametrize("width", [None, 40])
def test_a_notice_is_one_line_on_a_terminal_and_off_it(width: int | None) -> None:
    told = "notes: [2] files are no longer there; " + "x" * 60
    event = Event("collect", "copy", 0, 0, "", 0, notice=told)
    if width is None:
        assert lines_of(event) == [f"collect   notice: {told}"]
        return
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    bar = Bar(console)
    bar.show(event)
    bar.close()
    assert f"collect   notice: {told}\n" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_notice_reaches_an_orchestrator_with_the_numbers_of_the_last_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "events"
    monkeypatch.setenv(EVENTS_VARIABLE, str(events))
    with progress("collect") as shown:
        shown.begin("copy")
        shown.update(5, 5, "bytes")
        shown.notice("caf\udce9 has gone")
    first, second = (Event.from_json(line) for line in events.read_text().splitlines())
    assert (second.done, second.total, second.notice) == (first.done, 5, "caf\udce9 has gone")
    assert not first.notice
    assert json.loads(first.to_json())["notice"] == ""


def test_an_event_of_another_version_is_read() -> None:
    event = Event("train", "training", 1, 2, "steps", 0.5, {"loss": 3.0})
    written = json.loads(event.to_json())
    del written["notice"]
    assert Event.from_json(json.dumps(written | {"later": 1})) == event
    for damaged in ('{"stage": "train"}', '{"stage": "tr', "3"):
        with pytest.raises((ValueError, TypeError)):
            Event.from_json(damaged)
