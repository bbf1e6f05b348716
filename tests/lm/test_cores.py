"""A container's share of the processor's time counts, not the cores that it sees, and what others do on them."""

import os
import time
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


@pytest.mark.parametrize(
    ("core", "own", "at_rest", "share"),
    [
        # In a second: user, nice, system, idle, waiting for a disk, two kinds of interrupts, stolen.
        ("2 0 1 97 0 0 0 0", 0.0, True, 2.0),
        ("90 0 7 3 0 0 0 0", 1.9, True, 2.0),
        ("90 0 7 3 0 0 0 0", 0.9, False, 2.0),
        ("0 40 0 60 0 0 0 0", 0.0, False, 2.0),
        ("0 0 0 80 0 0 0 20", 0.0, False, 2.0),
        ("0 0 0 20 80 0 0 0", 0.0, True, 2.0),
        ("8 0 0 92 0 0 0 0", 0.0, True, 2.0),
        # In a container that has the time of one of the two.
        ("8 0 0 92 0 0 0 0", 0.0, False, 1.0),
    ],
)
def test_others_rest_where_cores_do_nothing_else(
    core: str, own: float, at_rest: bool, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, used = tmp_path / "stat", os.times()

    def tell(fields: str) -> None:
        # Of the others' core a process that is not bound to it takes no notice.
        busy = "cpu9 500 0 0 0 0 0 0 0" if fields == core else "cpu9 0 0 0 0 0 0 0 0"
        times.write_text(f"cpu  0 0 0 0\ncpu0 {fields} 0 0\ncpu1 {fields} 0 0\n{busy} 0 0\nintr 1 2 3\n")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(cores, "_shares", lambda: [share])
    monkeypatch.setattr(cores, "_TIMES", times)
    monkeypatch.setattr(os, "times", lambda: (0.0, 0.0, *used[2:]))
    tell("0 0 0 0 0 0 0 0")
    others, began = cores.Others(), time.monotonic()
    monkeypatch.setattr(os, "times", lambda: (own * 0.7, own * 0.3, *used[2:]))
    tell(core)
    assert others.rest() is at_rest
    # In less time, a few ticks decide.
    assert time.monotonic() >= began + 0.25


def test_where_the_system_does_not_say_it_others_do_not_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_TIMES", tmp_path / "none")
    assert not cores.Others().rest()


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="the system does not say what its cores did")
def test_what_this_process_computes_itself_is_counted_as_its_own() -> None:
    passed, busy, own = cores._ticks()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    passed_after, busy_after, own_after = cores._ticks()
    # Both are counted in ticks of 10 ms, by clocks of their own.
    assert own_after - own >= 25
    assert passed_after - passed >= 20
    assert busy_after - busy >= 20
