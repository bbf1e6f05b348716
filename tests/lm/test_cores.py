"""A container's share of the processor's time counts, not the cores that it sees."""

import os
from pathlib import Path

import pytest

from lm import cores


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(cores, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "_OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/a/b\n")
    (tmp_path / "groups/a/b").mkdir(parents=True)
    return tmp_path / "groups"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 64),
        ({"a/b": "max 100000"}, 64),
        ({"a/b": "200000 100000"}, 2),
        ({"a/b": "350000 100000", "a": "max 100000"}, 3),
        ({"a/b": "max 100000", "a": "150000 100000"}, 1),
        # Less than one core.
        ({".": "50000 100000"}, 1),
        ({"a/b": "9900000 100000"}, 64),
        ({"a/b": "nonsense"}, 64),
    ],
    ids=str,
)
def test_cores_are_those_that_a_process_may_keep_busy(limits: dict[str, str], expected: int, groups: Path) -> None:
    for group, limit in limits.items():
        (groups / group / "cpu.max").write_text(f"{limit}\n")
    assert cores.available() == expected


def test_a_container_sees_its_own_group_as_the_outermost(groups: Path) -> None:
    (groups.parent / "own").write_text("0::/\n")
    (groups / "cpu.max").write_text("200000 100000\n")
    assert cores.available() == 2


@pytest.mark.parametrize("own", ["12:cpu:/old\n", None], ids=["version 1", "no such file"])
def test_elsewhere_cores_are_those_that_it_is_bound_to(own: str | None, groups: Path) -> None:
    if own is None:
        (groups.parent / "own").unlink()
    else:
        (groups.parent / "own").write_text(own)
    assert cores.available() == 64
