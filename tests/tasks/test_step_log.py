"""The log of the steps holds each step once, whatever stopped the run, and TensorBoard shows the same."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tasks.step_log import StepLog
from tasks.step_meter import StepReport


def report(step: int, loss: float = 3.0) -> StepReport:
    return StepReport(
        step=step, loss=loss, grad_norm=1.0, learning_rate=0.1, tokens_per_second=5.0, mfu=0.1, seconds=1.0,
        seconds_for_data=0.1, seconds_for_communication=0.2, memory_mib=9.0, expert_load=(1.5, 2.0),
    )  # fmt: skip


def steps(log: StepLog) -> list[int]:
    return [json.loads(line)["step"] for line in log.path.read_text().splitlines()]


def test_a_resumed_run_takes_the_place_of_the_steps_after_its_checkpoint(project: Path) -> None:
    log = StepLog("train", 0)
    for step in (1, 2, 3):
        log.write(report(step))
    # A kill in the middle of a line.
    log._file.write('{"step": 1, "lo')
    log.close()
    resumed = StepLog("train", 2)
    resumed.write(report(3, loss=2.5))
    assert steps(resumed) == [1, 2, 3]
    assert json.loads(resumed.path.read_text().splitlines()[2])["loss"] == 2.5
    resumed.close()


def test_a_run_from_the_start_forgets_the_one_before(project: Path) -> None:
    for loss in (3.0, 2.0):
        log = StepLog("train", 0)
        log.write(report(1, loss))
        log.close()
    assert steps(log) == [1]


def test_each_step_is_there_as_soon_as_it_is_written(project: Path) -> None:
    log = StepLog("train", 0)
    log.write(report(1))
    assert steps(log) == [1]
    assert json.loads(log.path.read_text())["expert_load"] == [1.5, 2.0]
    log.close()


def test_tensorboard_shows_the_steps(project: Path) -> None:
    log = StepLog("train", 0)
    log.write(report(1))
    log.write(report(2, loss=2.5))
    log.close()
    shown = EventAccumulator(".overnight/tensorboard/train")
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(1, 3.0), (2, 2.5)]
    assert [event.value for event in shown.Scalars("expert_load/1")] == [2.0, 2.0]


def test_without_tensorboard_there_is_the_file_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    log = StepLog("train", 0)
    log.write(report(1))
    log.close()
    assert steps(log) == [1]
    assert not Path(".overnight/tensorboard").exists()
