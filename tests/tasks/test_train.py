"""Training: learns, does not depend on interruptions, and says what is wrong in one line."""

import csv
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from processes import alive
from waiting import until

from lm import hugging_face
from tasks.errors import UserMistake
from tasks.train.__main__ import main as stage_main


@pytest.fixture
def project(tmp_path: Path) -> Path:
    tiny.write_params(tmp_path)
    tiny.write_shards(tmp_path)
    return tmp_path


def test_the_loss_falls_and_the_reports_tell_it(trained: Path) -> None:
    curve = (trained / "models/curve.csv").read_text().split()
    rows = [dict(zip(curve[0].split(","), map(float, row.split(",")), strict=True)) for row in curve[1:]]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[-1]["valid_loss"] < rows[0]["valid_loss"] < 5.6
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    report = json.loads((trained / "models/train.json").read_text())
    assert report["tokens"] == 12 * 8 * 16
    assert report["valid_loss"] == pytest.approx(rows[-1]["valid_loss"], abs=1e-4)
    model = hugging_face.load(trained / "models/float")
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["active_parameters"] < report["parameters"]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / ".overnight/measurements/train-steps.jsonl").read_text().splitlines()
    ]


def test_each_step_is_told_outside_the_version(trained: Path) -> None:
    steps = steps_of(trained)
    assert [step["step"] for step in steps] == list(range(1, 13))
    rows = [row.split(",") for row in (trained / "models/curve.csv").read_text().split()[1:]]
    for row, last in zip(rows, (4, 8, 12), strict=True):
        assert float(row[1]) == pytest.approx(steps[last - 1]["learning_rate"], rel=1e-4)
        assert float(row[2]) == pytest.approx(sum(step["loss"] for step in steps[last - 4 : last]) / 4, rel=1e-4)
    for step in steps:
        assert 0 < step["seconds_for_data"] + step["seconds_for_communication"] < step["seconds"]
        assert 0 < step["mfu"] < 1
        assert step["tokens_per_second"] == pytest.approx(8 * 16 / step["seconds"], rel=1e-2)
        assert step["memory_mib"] > 50
        assert len(step["expert_load"]) == 1
        assert step["expert_load"][0] >= 1


def test_what_the_steps_took_is_summed_up_for_the_plots(trained: Path) -> None:
    rows = list(csv.DictReader((trained / "speed/train.csv").open()))
    assert [row["step"] for row in rows] == ["4", "8", "12"]
    for row, last in zip(rows, (4, 8, 12), strict=True):
        steps = steps_of(trained)[last - 4 : last]
        seconds, waiting = (sum(step[name] for step in steps) for name in ("seconds", "seconds_for_data"))
        assert float(row["tokens_per_second"]) == pytest.approx(4 * 8 * 16 / seconds, rel=1e-2)
        assert float(row["waiting_for_data"]) == pytest.approx(waiting / seconds, rel=1e-2)


def test_speed_is_measured_outside_the_version(trained: Path) -> None:
    measured = json.loads((trained / ".overnight/measurements/train.json").read_text())
    assert measured["tokens_per_second"] > 0
    assert 0 < measured["share_of_time_waiting_for_data"] < 1
    assert 0 < measured["share_of_time_communicating"] < 1
    assert 0 < measured["mfu"] < 1
    assert measured["peak_is"].endswith("product measured here")
    assert not {"tokens_per_second", "seconds"} & json.loads((trained / "models/train.json").read_text()).keys()


def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_bytes(project: Path, trained: Path) -> None:
    # Kills as soon as the second checkpoint lies there, somewhere in the steps that follow.
    process = tiny.stage("train", project)
    second = ".overnight/checkpoints/train/*/step-000000004-*.pt"
    until(lambda: any(project.glob(second)) or process.poll() is not None, 120)
    assert process.poll() is None, process.communicate()[0]
    process.kill()
    output, _ = process.communicate()
    # Torch's own log is not asked for.
    assert "[I" not in output
    assert "UserWarning" not in output
    assert not (project / "models").exists()
    before = {path.name for path in project.glob(".overnight/checkpoints/train/*/*.pt")}
    assert any("step-000000004" in name for name in before)
    events = project / "events"
    code, output = tiny.run("train", project, OVERNIGHT_EVENTS=str(events))
    assert code == 0, output
    first = tiny.first_step(events)
    assert first["done"] > 4, "it began again from the start"
    assert {"grad_norm", "tokens_per_second", "mfu", "waiting_for_data"} <= first["numbers"].keys()
    assert [step["step"] for step in steps_of(project)] == list(range(1, 13))
    assert [row["step"] for row in csv.DictReader((project / "speed/train.csv").open())] == ["4", "8", "12"]
    assert tiny.files_of(project / "models") == tiny.files_of(trained / "models")


def test_no_worker_outlives_a_killed_launcher(project: Path) -> None:
    tiny.write_params(project, train__steps=100000)
    process = tiny.stage("train", project)
    until(lambda: any(project.glob(".overnight/checkpoints/train/*/*.pt")) or process.poll() is not None, 120)
    assert process.poll() is None, process.communicate()[0]
    workers = psutil.Process(process.pid).children(recursive=True)
    assert {worker.name() for worker in workers} == {"rank 0", "rank 1"}
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not any(map(alive, left))


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path: Path, trained: Path) -> None:
    project = shutil.copytree(trained, tmp_path / "project")
    newest = max(project.glob(".overnight/checkpoints/train/*/*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    code, output = tiny.run("train", project)
    assert code == 0, output
    assert f"{newest.name}: damaged checkpoint" in output
    assert tiny.files_of(project / "models") == tiny.files_of(trained / "models")


def test_checkpoints_of_other_inputs_are_not_continued(tmp_path: Path, trained: Path) -> None:
    project = shutil.copytree(trained, tmp_path / "project")
    tiny.write_params(project, train__learning_rate=0.001)
    events = project / "events"
    assert tiny.run("train", project, OVERNIGHT_EVENTS=str(events))[0] == 0
    assert tiny.first_step(events)["done"] == 1
    assert len(list(project.glob(".overnight/checkpoints/train/*"))) == 2


def test_one_process_with_accumulation_learns_what_two_learn(project: Path) -> None:
    losses = []
    for world_size in (1, 2):
        tiny.write_params(project, train__world_size=world_size, train__precision="fp32")
        assert tiny.run("train", project)[0] == 0
        losses.append((project / "models/curve.csv").read_text().split()[1:])
    one, two = ([list(map(float, row.split(","))) for row in rows] for rows in losses)
    # Columns: step, learning rate, losses, gradient norm, imbalance: all but the order of sums is the same.
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=2e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__learning_rate": -1.0}, "train.learning_rate: input should be greater than 0, found -1.0"),
        ({"train__steps": "many"}, "train.steps: input should be a valid integer, found 'many'"),
        ({"train__stepz": 3}, "train.stepz: unknown key"),
        ({"train__micro_batch": 3}, "global_batch 8 is not a multiple of micro_batch 3 x world_size 2"),
        ({"train__model__qk_rope_head_dim": 5}, "RoPE turns pairs"),
        ({"train__model": {**tiny.LLAMA, "head_dim": 15}}, "head_dim is 15; RoPE turns pairs, so make it even"),
        ({"train__model__num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the 4 experts"),
        (
            {"train__global_batch": 4096, "train__micro_batch": 2},
            "and 4096 are needed. Collect more text, or lower train.seq_len or train.global_batch",
        ),
    ],
)
def test_a_wrong_parameter_is_one_line_before_any_process_starts(
    changes: dict[str, object], message: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_params(project, **changes)
    monkeypatch.chdir(project)
    with pytest.raises(UserMistake, match=re.escape(message)) as caught:
        stage_main()
    assert "\n" not in str(caught.value)
    assert not (project / ".overnight").exists()


def test_a_flipped_byte_in_a_shard_is_named_before_training(project: Path) -> None:
    shard = project / "data/shards/train-00000.h5"
    content = bytearray(shard.read_bytes())
    content[4500] ^= 16
    shard.write_bytes(content)
    code, output = tiny.run("train", project)
    assert code == 2
    assert "data/shards/train-00000.h5: damaged" in tiny.error_line(output)


def test_another_tokenizer_than_the_shards_is_told(project: Path) -> None:
    path = project / "data/shards/tokenizer.json"
    path.write_text(path.read_text() + " ")
    code, output = tiny.run("train", project)
    assert code == 2
    assert "data/shards/tokenizer.json: not the tokenizer that made the shards" in tiny.error_line(output)


def test_more_gpus_than_there_are_is_told_before_any_process_starts(project: Path) -> None:
    tiny.write_params(project, train__device="cuda", train__world_size=64, train__global_batch=128)
    code, output = tiny.run("train", project)
    assert code == 2
    assert "train.device is cuda and train.world_size 64, but torch sees" in tiny.error_line(output)


def test_three_processes_resume_to_the_same_bytes_too(project: Path) -> None:
    # With two processes a sum of two cannot depend on its order; with three it can.
    tiny.write_params(project, train__world_size=3, train__global_batch=6, train__checkpoint_every=6)
    assert tiny.run("train", project)[0] == 0
    expected = tiny.files_of(project / "models")
    last = max(project.glob(".overnight/checkpoints/train/*/step-000000012-*.pt"))
    last.unlink()
    events = project / "events"
    assert tiny.run("train", project, OVERNIGHT_EVENTS=str(events))[0] == 0
    assert tiny.first_step(events)["done"] == 7
    assert tiny.files_of(project / "models") == expected


def test_a_diverging_run_says_which_knob_to_turn(project: Path) -> None:
    tiny.write_params(project, train__learning_rate=1e30, train__clip_grad_norm=1e30, train__precision="fp32")
    code, output = tiny.run("train", project)
    assert code == 2
    assert "the gradient is not finite at step" in output
    assert "Halve learning_rate" in output
    assert "Traceback" not in output


def test_muon_trains_and_resumes_to_the_same_bytes(project: Path) -> None:
    tiny.write_params(project, **tiny.ALONE, train__optimizer="muon", train__checkpoint_every=6)
    assert tiny.run("train", project)[0] == 0
    expected = tiny.files_of(project / "models")
    rows = expected["curve.csv"].decode().split()[1:]
    assert float(rows[-1].split(",")[3]) < float(rows[0].split(",")[3]) < 5.6
    max(project.glob(".overnight/checkpoints/train/*/step-000000012-*.pt")).unlink()
    assert tiny.run("train", project)[0] == 0
    assert tiny.files_of(project / "models") == expected


def test_activation_checkpointing_changes_no_byte(project: Path, trained: Path) -> None:
    tiny.write_params(project, train__activation_checkpointing="selective")
    code, output = tiny.run("train", project)
    assert code == 0, output
    assert tiny.files_of(project / "models") == tiny.files_of(trained / "models")
