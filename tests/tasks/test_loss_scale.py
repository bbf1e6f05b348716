"""Training in fp16: gradients are lifted by a factor, and a step that overflows is left out by all processes alike."""

import json
from pathlib import Path
from typing import Any

import disturb
import forked
import pytest
import tiny
import torch
from checkpoint_files import tensors_of
from torch import nn

from lm import hugging_face
from lm.loss import cross_entropy, projected_cross_entropy
from tasks import loss_scale, paths
from tasks.loss_scale import LossScale
from tasks.order import batch_of_rank
from tasks.section import read_section
from tasks.shards import Shards, read_manifest
from tasks.train.params import TrainParams

FP16 = {"train__precision": "fp16"}
MESHES: list[dict[str, Any]] = [{}, {"train__mesh__shard": 2}, {"train__mesh__tensor": 2}]
PIPELINE = {"train__mesh__pipeline": 2}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_shards(tmp_path)
    return tmp_path


def train(project: Path, overflows: str = "") -> dict[str, Any]:
    log = project / "log"
    variables = {"OVERFLOWS": overflows, "OVERNIGHT_EVENTS": "events"}
    codes = forked.end(forked.start([project, project], log, disturb.overflow, **variables))
    assert codes == [0, 0], log.read_text()
    return report(project)


def report(project: Path) -> dict[str, Any]:
    return {**json.loads((project / "models/train.json").read_text()), "norm": last_norm(project)}


def last_norm(project: Path) -> float:
    """The gradient's norm, averaged over the last steps: the optimizer alone would not notice a factor left in it."""
    names, *_, last = (project / paths.CURVE).read_text().splitlines()
    return float(dict(zip(names.split(","), last.split(","), strict=True))["grad_norm"])


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process learns in fp32. That processes on any mesh learn the same: test_parallel."""
    folder = tmp_path_factory.mktemp("exact")
    tiny.write_params(folder, **tiny.ALONE, train__precision="fp32")
    tiny.write_shards(folder)
    code, output = tiny.run("train", folder)
    assert code == 0, output
    return report(folder)


@pytest.mark.parametrize("changes", [MESHES[0], MESHES[2], PIPELINE])
def test_fp16_learns_what_fp32_learns(project: Path, changes: dict[str, Any], exact: dict[str, Any]) -> None:
    tiny.write_params(project, **FP16, **changes)
    found = train(project)
    assert found["precision"] == "fp16"
    assert found["skipped_steps"] == found["overflowed_steps"] == 0
    assert "overflowed_steps" not in exact
    assert found["train_loss"] == pytest.approx(exact["train_loss"], rel=0.01)
    assert found["train_loss"] != exact["train_loss"]
    assert found["norm"] == pytest.approx(exact["norm"], rel=0.05)


@pytest.mark.parametrize("changes", [*MESHES[:2], PIPELINE])
def test_an_overflow_in_one_process_is_left_out_by_both_and_halves_the_factor(
    project: Path, changes: dict[str, Any]
) -> None:
    often = {"train__steps": 8, "train__keep_checkpoints": 8, "train__checkpoint_every": 1}
    tiny.write_params(project, **FP16, **often, **changes)
    params = read_section("train", TrainParams)
    count = len(Shards(Path("data/shards"), read_manifest(), "train").reader(params.seq_len))
    windows = [
        batch_of_rank(step - 1, count, params.seed, params.global_batch, params.micro_batch, 1, 2).flatten()[0]
        for step in (5, 6)
    ]
    spoilt = ",".join(map(str, windows))
    assert train(project, spoilt)["overflowed_steps"] == 2
    # It is no fault of the training, and nobody has to be told.
    assert not any(json.loads(line)["notice"] for line in (project / "events").open())
    files = {int(path.name[5:14]): path for path in project.glob(".overnight/checkpoints/train/*/*.pt")}
    states = {step: torch.load(file, weights_only=True) for step, file in files.items()}
    for step, value in {4: 2.0**16, 5: 2.0**15, 6: 2.0**14, 8: 2.0**14}.items():
        assert states[step]["scale"]["value"] == value
    four, six, seven = (tensors_of(files[step], "model.") for step in (4, 6, 7))
    assert all(torch.equal(six[name], weight) for name, weight in four.items())
    assert not all(torch.equal(seven[name], weight) for name, weight in six.items())
    assert all(torch.isfinite(weight).all() for weight in hugging_face.load(project / "models/float").parameters())

    expected = tiny.files_of(project / "models")
    for step in (7, 8):
        files[step].unlink()
    train(project, spoilt)
    assert tiny.files_of(project / "models") == expected


def test_a_training_of_overflows_alone_ends_in_one_line(project: Path) -> None:
    tiny.write_params(project, **FP16, **tiny.ALONE)
    every = range(len(Shards(Path("data/shards"), read_manifest(), "train").reader(16)))
    # The second attempt goes on after the last step.
    for attempt in ("first", "second"):
        log = project / attempt
        ranks = forked.start([project], log, disturb.overflow, OVERFLOWS=",".join(map(str, every)))
        assert forked.end(ranks) == [2]
        assert tiny.error_line(log.read_text()) == (
            "params.yaml: train: no step could be taken: at none of 12 was the gradient finite in fp16, though the "
            "loss's factor was halved 12 times. Set precision: bf16 or fp32, or raise steps."
        )


def test_the_factor_moves_as_torchs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_STEPS_UNTIL_DOUBLED", 3)
    ours, theirs = LossScale("fp16"), torch.amp.GradScaler("cpu", growth_interval=3)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflows in (False, False, True, False, False, False, True, True, False, False, False, False):
        theirs.scale(weight.sum() * (float("inf") if overflows else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        if overflows:
            assert ours.halve()
        else:
            ours.keep()
        assert ours.value == theirs.get_scale()
    while ours.value > 1:
        assert ours.halve()
    assert not ours.halve()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_other_precisions_have_none(precision: str) -> None:
    scale = LossScale(precision)
    for _ in range(3000):
        scale.keep()
    assert scale.value == 1.0
    assert not scale.halve()


@pytest.mark.parametrize("held", [2**26, 8 * 40_000])
def test_the_gradients_of_a_long_batch_are_not_rounded_to_zero(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.loss.LOGITS_HELD", held)
    generator = torch.Generator().manual_seed(0)
    # A row's share of the mean is near fp16's least number.
    rows = 300_000
    targets = torch.randint(8, (rows,), generator=generator)
    x = torch.randn(rows, 16, generator=generator)
    head = nn.Linear(16, 8, bias=False)
    nn.init.normal_(head.weight, generator=generator)
    found = []
    for precision in (torch.float32, torch.float16):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = projected_cross_entropy(head, inputs, targets, 8)
        (gradient,) = torch.autograd.grad(loss * 2.0**16, inputs)
        found.append(gradient)
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()


def test_a_gradient_below_fp16s_least_number_is_kept_until_the_factor_lifts_it() -> None:
    logits = torch.tensor([[0.0, -12.0]] * 4096, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.long)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, targets) * 2.0**16, logits)
    expected = 2.0**16 / 4096 / (1 + torch.tensor(12.0).exp())
    assert expected / 2.0**16 < 2.0**-25
    assert gradient[:, 1].float().mean() == pytest.approx(float(expected), rel=1e-2)
