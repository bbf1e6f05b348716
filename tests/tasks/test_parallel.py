"""Every mesh trains as one process does. Tolerances are for fp32 and sums in another order, nothing else."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import meshes
import pytest
import torch
from meshes import Case, Result

ROOT = Path(__file__).parents[2]
Trained = Callable[[Case], Result]

TWO = [
    Case({}),
    Case({}, micro_batch=4),
    Case({"shard": 2}),
    Case({"shard": 2}, micro_batch=4),
    Case({"shard": 2}, "qwen3"),
]
FOUR = [
    Case({}),
    Case({"shard": 4}),
    Case({"shard": 2}),
    Case({"shard": 2}, micro_batch=1),
]
# Each takes over what the case of that number left after five steps.
HALVES = [Case({"shard": 2}, steps=5), Case({}, steps=5)]
RESUMED = [Case({}, resume=0), Case({"shard": 2}, resume=1)]
WRONG = [
    Case({"shard": 2}, mistake="the replicas' gradients are not summed"),
    Case({"shard": 4}, mistake="the gradients are summed, not averaged"),
    Case({"shard": 4}, mistake="each process clips by the norm of its part"),
]
alone = functools.lru_cache(lambda model: meshes.alone(Case({}, model)))


def name_of(case: Case) -> str:
    mesh = "-".join(f"{axis}{size}" for axis, size in case.mesh.items()) or "replicate"
    return f"{case.model}-{mesh}-{case.micro_batch}" + (f"-{case.mistake}" if case.mistake else "")


def launch(folder: Path, processes: int, cases: list[Case]) -> list[Result]:
    """Returns what each of ``cases`` gave on so many processes."""
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, meshes.__file__, str(folder / "cases.json"), str(folder / "results.pt")]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}"
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, "RANK": str(rank), "WORLD_SIZE": str(processes)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(outputs)
    return [Result(**found) for found in torch.load(folder / "results.pt", weights_only=True)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return launch(tmp_path_factory.mktemp("two"), 2, [*HALVES, *RESUMED, *TWO])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return launch(tmp_path_factory.mktemp("four"), 4, [*FOUR, *WRONG])


def check_equal(result: Result, expected: Result) -> None:
    """Fails unless losses, norms, first gradients, statistics and samples are those of one process."""
    assert result.samples == expected.samples
    assert result.losses == pytest.approx(expected.losses, rel=2e-6)
    assert result.norms == pytest.approx(expected.norms, rel=1e-4)
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        # Relative to the largest of the tensor: an element may be the rest of a sum that cancels.
        torch.testing.assert_close(result.gradients[name] / gradient.abs().max(), gradient / gradient.abs().max(), atol=2e-6, rtol=0)
    assert result.weights.keys() == expected.weights.keys()
    for name in expected.weights:
        torch.testing.assert_close(result.weights[name], expected.weights[name], atol=1e-4, rtol=1e-4)
    assert result.valid_loss == pytest.approx(expected.valid_loss, rel=1e-5)


@pytest.mark.parametrize("case", TWO, ids=name_of)
def test_two_processes_train_as_one_does(case: Case, two: list[Result]) -> None:
    check_equal(two[len(HALVES + RESUMED) + TWO.index(case)], alone(case.model))


@pytest.mark.parametrize("case", FOUR, ids=name_of)
def test_four_processes_train_as_one_does(case: Case, four: list[Result]) -> None:
    check_equal(four[FOUR.index(case)], alone(case.model))


@pytest.mark.parametrize("number", range(len(RESUMED)))
def test_a_checkpoint_of_one_mesh_goes_on_on_another(number: int, two: list[Result]) -> None:
    resumed, expected = two[len(HALVES) + number], alone("latent")
    assert resumed.losses == pytest.approx(expected.losses[5:], rel=1e-5)
    for name, weights in expected.weights.items():
        torch.testing.assert_close(resumed.weights[name], weights, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", WRONG, ids=name_of)
def test_a_mistake_in_the_layout_is_seen(case: Case, four: list[Result]) -> None:
    with pytest.raises(AssertionError):
        check_equal(four[len(FOUR) + WRONG.index(case)], alone(case.model))


def test_a_process_of_a_sharded_model_keeps_its_share(four: list[Result]) -> None:
    whole = alone("latent").elements
    assert four[1].elements < 0.3 * whole
    assert four[2].elements < 0.55 * whole
