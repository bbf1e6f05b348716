"""Steps whose loss or gradient is not finite: left out on all processes alike, counted, and too many end the run.

A validation loss that is not finite ends it at once.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import disturb
import forked
import pytest
import tiny
import torch
from checkpoint_files import tensors_of

from lm import hugging_face
from tasks.order import batch_of_rank
from tasks.section import read_section
from tasks.shards import Shards, read_manifest
from tasks.train.params import TrainParams


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_params(tmp_path, train__max_skipped_steps=2, train__keep_checkpoints=12, train__checkpoint_every=1)
    tiny.write_shards(tmp_path)
    return tmp_path


def windows_of(step: int, rank: int) -> list[int]:
    """The windows that ``rank`` of two sees in ``step``, counted from 1."""
    params = read_section("train", TrainParams)
    count = len(Shards(Path("data/shards"), read_manifest(), "train").reader(params.seq_len))
    batch = batch_of_rank(step - 1, count, params.seed, params.global_batch, params.micro_batch, rank, 2)
    return sorted(batch.flatten().tolist())


def train(project: Path, spoilt: list[int], spoil: Callable[[], None] = disturb.spoil) -> tuple[list[int | None], str]:
    log = project / "log"
    log.unlink(missing_ok=True)
    variables = {"SPOILT": ",".join(map(str, spoilt)), "OVERNIGHT_EVENTS": "events"}
    codes = forked.end(forked.start([project, project], log, spoil, **variables))
    return codes, log.read_text()


def test_a_step_that_one_process_finds_not_finite_is_left_out_by_both(project: Path) -> None:
    spoilt = [windows_of(5, rank=1)[0], windows_of(12, rank=0)[0]]
    codes, told = train(project, spoilt)
    assert codes == [0, 0], told
    assert json.loads((project / "models/train.json").read_text())["skipped_steps"] == 2
    model = hugging_face.load(project / "models/float")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    notices = [event["notice"] for event in map(json.loads, (project / "events").open()) if event["notice"]]
    windows = ", ".join(map(str, sorted(windows_of(5, 0) + windows_of(5, 1))))
    assert notices[0] == f"skipped step 5 (loss inf, windows {windows}): the gradient is not finite"
    assert len(notices) == 2
    expected = tiny.files_of(project / "models")
    files = {int(path.name[5:14]): path for path in project.glob(".overnight/checkpoints/train/*/*.pt")}
    before, after = (tensors_of(files[step]) for step in (11, 12))
    assert before.keys() == after.keys()
    assert any(name.startswith("optimizer.") for name in before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for step in range(7, 13):
        files[step].unlink()
    assert train(project, spoilt)[0] == [0, 0]
    assert tiny.files_of(project / "models") == expected


def test_the_processes_agree_on_a_step_of_which_one_alone_can_see_that_it_is_spoilt(project: Path) -> None:
    # Its loss is not finite, and the gradients that all have are.
    codes, told = train(project, [windows_of(5, rank=1)[0]], disturb.spoil_the_loss)
    assert codes == [0, 0], told
    assert json.loads((project / "models/train.json").read_text())["skipped_steps"] == 1


def test_too_many_in_a_row_name_the_batch_and_are_counted_across_a_resume(project: Path) -> None:
    spoilt = [windows_of(step, step % 2)[0] for step in (3, 6, 7, 8)]
    codes, told = train(project, spoilt)
    assert codes == [2, 2]
    windows = ", ".join(map(str, sorted(windows_of(8, 0) + windows_of(8, 1))))
    complaint = tiny.error_line(told)
    assert f"the gradient is not finite at step 8 (loss inf, windows {windows}), step 3 of a row" in complaint
    logged = [*map(json.loads, (project / ".overnight/measurements/train-steps.jsonl").open())]
    assert [line["step"] for line in logged if line["skipped"]] == [3, 6, 7, 8]
    # It goes on after step 6, the first of the row.
    assert tiny.error_line(train(project, spoilt)[1]) == complaint


def test_replicas_that_train_apart_tell_of_each_others_steps_when_they_meet(project: Path) -> None:
    apart = {"train__diloco": {"inner_steps": 4}, "train__validate_every": 4, "train__checkpoint_every": 4}
    tiny.write_params(project, train__max_skipped_steps=2, **apart)
    spoilt = [windows_of(step, 1)[0] for step in (3, 6, 7, 8)]
    codes, told = train(project, spoilt)
    assert codes == [2, 2]
    windows = {step: ", ".join(map(str, sorted(windows_of(step, 0) + windows_of(step, 1)))) for step in (3, 6, 7, 8)}
    assert f"not finite at step 8 (windows {windows[8]}), step 3 of a row" in tiny.error_line(told)
    notices = [event["notice"] for event in map(json.loads, (project / "events").open()) if event["notice"]]
    assert notices == [
        f"skipped step {step} (windows {windows[step]}) in another replica: the gradient is not finite"
        for step in (3, 6, 7, 8)
    ]


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"train__precision": "fp32"}, "learning_rate (now 0.003) or lengthen warmup_fraction"),
        (
            {"train__precision": "fp16", "train__optimizer": "muon", "train__muon_learning_rate": 0.1},
            "learning_rate (now 0.003) and muon_learning_rate (now 0.1), lengthen warmup_fraction, or set precision: "
            "bf16 or fp32 (now fp16)",
        ),
    ],
)
def test_a_validation_loss_that_is_not_finite_ends_in_one_line(
    project: Path, changes: dict[str, Any], cure: str
) -> None:
    tiny.write_params(project, train__validate_every=2, train__checkpoint_every=1, **changes)
    log = project / "log"
    codes = forked.end(forked.start([project, project], log, disturb.diverge, LOSS="inf", FROM="3"))
    assert codes == [2, 2], log.read_text()
    assert tiny.error_line(log.read_text()) == (
        "params.yaml: train: the validation loss is not finite (inf) after step 6 of 12: the training has diverged. "
        f"Halve {cure}."
    )
    # The checkpoints before it stay, and of the model nothing was written.
    steps = sorted(int(path.name[5:14]) for path in project.glob(".overnight/checkpoints/train/*/*.pt"))
    assert 4 in steps
    assert steps[-1] <= 5
    assert not (project / "models").exists()


def test_a_model_that_the_last_steps_spoil_ends_in_one_line(project: Path) -> None:
    # Too few steps are left for too many to be skipped.
    tiny.write_params(project, **tiny.ALONE, train__learning_rate=1e18, train__steps=3, train__precision="fp32")
    # The second attempt goes on from a checkpoint.
    for _ in range(2):
        code, output = tiny.run("train", project)
        assert code == 2, output
        line = tiny.error_line(output)
        assert "params.yaml: train: the validation loss is not finite (nan) after step 3 of 3" in line
        assert "Halve learning_rate (now 1e+18) or lengthen" in line
