"""The log of the steps holds each step once, whatever stopped the run, and TensorBoard shows the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tasks.step_log import StepLog, logged, sum_up
from tasks.step_meter import StepReport


def report(step: int, loss: float = 3.0, **others: Any) -> StepReport:
    values: dict[str, Any] = {
        "step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 5.0, "mfu": 0.1,
        "seconds": 1.0, "seconds_for_data": 0.1, "seconds_for_communication": 0.2, "memory_mib": 9.0,
        "expert_load": (1.5, 2.0),
    }  # fmt: skip
    return StepReport(**values | others)


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


def test_what_the_steps_took_is_summed_up_by_stretches_of_them(project: Path) -> None:
    log = StepLog("train", 0)
    log.write(report(1))
    # Of three seconds, so that the two steps have taken four for 5 + 3 x 13 tokens.
    log.write(report(2, seconds=3.0, tokens_per_second=13.0, mfu=0.3, seconds_for_data=0.3, memory_mib=11.0))
    log.write(report(3))
    log.write(report(4, seconds_for_communication=None))
    log.close()
    sum_up("train", logged("train"), 2)
    header, *rows = Path("speed/train.csv").read_text().splitlines()
    assert header == "step,tokens_per_second,mfu,waiting_for_data,communicating,memory_mib"
    assert rows == ["2,11,0.25,0.1,0.1,11", "4,5,0.1,0.1,,9"]


def test_tensorboard_shows_the_steps(project: Path) -> None:
    log = StepLog("train", 0)
    log.write(report(1))
    log.write(report(2, loss=2.5, bytes_sent=1000))
    log.close()
    shown = EventAccumulator(".overnight/tensorboard/train")
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(1, 3.0), (2, 2.5)]
    assert [event.value for event in shown.Scalars("expert_load/1")] == [2.0, 2.0]
    assert [event.value for event in shown.Scalars("bytes_sent")] == [1000.0]


def test_what_a_disk_made_of_a_log_does_not_stop_a_training(project: Path) -> None:
    log = StepLog("train", 0)
    log.write(report(1))
    log.close()
    log.path.write_bytes(log.path.read_bytes() + b"\xff\xfe{}\n")
    log = StepLog("train", 1)
    log.close()
    assert steps(log) == [1]


def test_without_tensorboard_there_is_the_file_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    log = StepLog("train", 0)
    log.write(report(1))
    log.close()
    assert steps(log) == [1]
    assert not Path(".overnight/tensorboard").exists()
