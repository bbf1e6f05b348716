"""Experts without a bias are evened out by a loss. That its gradient is right on every mesh: see test_parallel.py."""

from pathlib import Path
from typing import Any

import odd
import pytest
import tiny
import torch

from tasks.balance import Balance
from tasks.train.params import TrainParams

TRAINED = {**tiny.ALONE, "train__model": tiny.QWEN3_MOE, "train__steps": 48, "train__checkpoint_every": 24}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    tiny.write_shards(tmp_path)
    return tmp_path


def imbalance(files: dict[str, bytes]) -> float:
    header, *rows = files["curve.csv"].decode().split()
    return float(rows[-1].split(",")[header.split(",").index("expert_imbalance")])


def test_it_evens_them_out_and_a_resumed_training_has_the_same_bytes(project: Path) -> None:
    models = {}
    for weight in (0.0, 0.1):
        tiny.write_params(project, **TRAINED, train__balance_loss_weight=weight)
        code, output = tiny.run("train", project)
        assert code == 0, output
        models[weight] = tiny.files_of(project / "models")
    assert imbalance(models[0.1]) < imbalance(models[0.0]) - 0.3
    for newest in project.glob(".overnight/checkpoints/train/*/step-000000048-*.pt"):
        newest.unlink()
    events = project / "events"
    assert tiny.run("train", project, OVERNIGHT_EVENTS=str(events))[0] == 0
    assert tiny.first_step(events)["done"] == 25
    assert tiny.files_of(project / "models") == models[0.1]


def test_only_routers_that_are_trained_and_have_no_bias_are_pressed() -> None:
    pressed, frozen, without = (odd.make_grouped_mixture() for _ in range(3))
    for router in frozen.routers():
        router.weight.requires_grad_(False)
    for model, weight in ((pressed, 0.5), (frozen, 0.5), (without, 0.0), (odd.make_model(), 0.5)):
        params: Any = TrainParams.model_construct(balance_loss_weight=weight, bias_update_rate=0.0)
        Balance(model.routers(), params, torch.device("cpu")).press(2.0)
        expected = 1.0 if model is pressed else None
        assert [router.pressure for router in model.routers()] == [expected] * len(model.routers())
