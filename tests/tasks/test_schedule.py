"""Each schedule warms up linearly, reaches its peak once, and ends at its floor."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny

from tasks.errors import BadParameter
from tasks.schedule import learning_rate_at

PEAK = 2.0


def rates(folder: Path, **changes: Any) -> list[float]:
    given = {"train__steps": 100, "train__min_learning_rate_ratio": 0.1, **changes}
    params = tiny.train_params(folder, **given)
    return [learning_rate_at(step, params, PEAK) for step in range(params.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_warm_up_is_linear_over_a_tenth_of_the_steps_and_the_end_is_the_floor(schedule: str, tmp_path: Path) -> None:
    found = rates(tmp_path, train__schedule=schedule)
    assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert found[10] == pytest.approx(PEAK)
    assert found[-1] == pytest.approx(0.1 * PEAK)
    assert all(earlier >= later for earlier, later in itertools.pairwise(found[9:]))


def test_a_line_falls_by_the_same_in_every_step(tmp_path: Path) -> None:
    found = rates(tmp_path, train__schedule="linear")
    assert [later - earlier for earlier, later in itertools.pairwise(found[10:])] == pytest.approx([-1.8 / 89] * 89)


def test_a_cosine_is_half_way_down_in_the_middle(tmp_path: Path) -> None:
    found = rates(tmp_path, train__schedule="cosine", train__steps=101, train__warmup_fraction=0.0)
    assert found[50] == pytest.approx(0.55 * PEAK)
    assert found[25] > 0.75 * PEAK


def test_wsd_stays_at_the_peak_until_its_decay(tmp_path: Path) -> None:
    found = rates(tmp_path, train__schedule="wsd", train__decay_fraction=0.3)
    assert found[9:71] == [PEAK] * 62
    assert found[71] < PEAK
    assert found[-2] - found[-1] == pytest.approx(1.8 / 29)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__schedule": "wsd", "train__decay_fraction": 0.1, "train__steps": 4},
        {"train__schedule": "cosine", "train__warmup_fraction": 0.75, "train__steps": 4},
        {"train__schedule": "linear", "train__warmup_fraction": 0.5, "train__steps": 2},
    ],
)
def test_a_way_down_of_one_step_ends_at_the_floor(changes: dict[str, Any], tmp_path: Path) -> None:
    found = rates(tmp_path, **changes)
    assert found[-2] == PEAK
    assert found[-1] == pytest.approx(0.1 * PEAK)


def test_a_decay_that_the_warm_up_leaves_no_room_for_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match=r"train: warmup_fraction 0\.1 and decay_fraction 0\.95 .* lower .* to 0\.9"):
        rates(tmp_path, train__schedule="wsd", train__decay_fraction=0.95)
