"""The loss on held-out windows: those that are chosen, dealt out over processes, and what breaks it off."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from odd import make_model

from tasks.heartbeat import Heartbeat
from tasks.parallel.alone import Alone
from tasks.process import Process
from tasks.progress import Lines, Progress
from tasks.shards import WindowReader
from tasks.validation import validate
from tasks.world import World

TOKENS = np.random.default_rng(0).integers(0, 100, 401).astype(np.uint16)


class Part(World):
    """One of several processes, which keeps to itself what all would sum."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


def process(rank: int, size: int) -> Process:
    world = Part(rank, size, torch.device("cpu"), "fp32")
    return Process("train", world, Progress("train", Lines(lambda line: None)), Heartbeat())


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_it_is_the_mean_over_windows_spread_evenly_however_they_are_dealt_out(
    size: int, answers: bool, tmp_path: Path
) -> None:
    mask = (np.random.default_rng(1).random(401) < 0.5).astype(np.uint8)
    windows = WindowReader([TOKENS], 20, [mask] if answers else [])
    params = tiny.train_params(tmp_path, train__validation_windows=7, train__micro_batch=2)
    model = make_model()
    parts = [
        validate(Alone(model, one.world), windows, params, one, lambda: False)
        for one in (process(rank, size) for rank in range(size))
    ]
    losses, learned = 0.0, 0
    for index in (0, 2, 5, 8, 11, 14, 17):
        tokens = torch.from_numpy(TOKENS[20 * index : 20 * index + 21].astype(np.int64))
        counted = torch.from_numpy(mask[20 * index + 1 : 20 * index + 21] if answers else np.ones(20))
        with torch.no_grad():
            log = model(tokens[None, :-1])[0].log_softmax(-1)
        losses -= float((log[range(20), tokens[1:]] * counted).sum())
        learned += int(counted.sum())
    assert len(windows) == 20
    assert sum(parts) == pytest.approx(losses / learned, rel=1e-5)


def test_who_is_told_to_end_breaks_off_and_is_ready_to_train(tmp_path: Path) -> None:
    params = tiny.train_params(tmp_path, train__validation_windows=7, train__micro_batch=2)
    model, here, asked = make_model(), process(0, 1), iter([False, True])
    assert validate(Alone(model, here.world), WindowReader([TOKENS], 20), params, here, lambda: next(asked)) is None
    assert next(asked, None) is None
    assert model.training
