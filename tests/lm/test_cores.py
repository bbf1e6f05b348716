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


class System:
    """What a system tells of cores and groups, before a second has passed and after."""

    def __init__(self, folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._times, self._count, self._group, self._patch = folder / "stat", count, folder / "groups/a", monkeypatch
        self._used = os.times()
        self._group.mkdir(parents=True)
        (folder / "own").write_text("0::/a\n")
        monkeypatch.setattr(cores, "_OWN_GROUP", folder / "own")
        monkeypatch.setattr(cores, "_GROUPS", folder / "groups")
        monkeypatch.setattr(cores, "_TIMES", self._times)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))
        monkeypatch.setattr(os, "sysconf", lambda _: 100)

    def limit(self, share: float) -> None:
        (self._group / "cpu.max").write_text(f"{int(share * 100_000)} 100000\n")

    def tell(self, ticks: list[str], own: float, of_group: float | None) -> None:
        """``ticks``: of each core as /proc/stat has them; ``own`` and ``of_group`` in seconds."""
        # Of the others' core a process that is not bound to it takes no notice.
        lines = [f"cpu{number} {fields} 0 0" for number, fields in enumerate([*ticks, "500 0 0 0 0 0 0 0"])]
        self._times.write_text("\n".join(["cpu  0 0 0 0", *lines, "intr 1 2 3\n"]))
        self._patch.setattr(os, "times", lambda: (own * 0.7, own * 0.3, *self._used[2:]))
        if of_group is not None:
            (self._group / "cpu.stat").write_text(f"usage_usec {int(of_group * 1e6)}\nuser_usec 1\n")

    def rest(self, ticks: list[str], own: float = 0.0, of_group: float | None = None) -> bool:
        """Returns whether others rest that do this within a second."""
        self.tell(["0 0 0 0 0 0 0 0"] * self._count, 0.0, None if of_group is None else 0.0)
        others, began = cores.Others(), time.monotonic()
        self.tell(ticks, own, of_group)
        found = others.rest()
        # In less time, a few ticks decide.
        assert time.monotonic() >= began + 0.25
        return found


@pytest.mark.parametrize(
    ("core", "own", "at_rest"),
    [
        # In a second: user, nice, system, idle, waiting for a disk, two kinds of interrupts, stolen.
        ("2 0 1 97 0 0 0 0", 0.0, True),
        ("90 0 7 3 0 0 0 0", 1.9, True),
        ("90 0 7 3 0 0 0 0", 0.9, False),
        ("0 40 0 60 0 0 0 0", 0.0, False),
        ("0 0 0 80 0 0 0 20", 0.0, False),
        ("0 0 0 20 80 0 0 0", 0.0, True),
        ("8 0 0 92 0 0 0 0", 0.0, True),
    ],
)
def test_others_rest_where_cores_do_nothing_else(
    core: str, own: float, at_rest: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert System(tmp_path, 2, monkeypatch).rest([core] * 2, own) is at_rest


@pytest.mark.parametrize(
    ("busy", "limit", "of_group", "at_rest"),
    [
        (0, None, None, True),
        # It holds up the thread on that core, for which 63 others wait.
        (1, None, None, False),
        (6, None, None, False),
        # Who has the time of two of them finds them idle, whatever is done elsewhere,
        (6, 2.0, 0.0, True),
        (62, 2.0, 0.1, True),
        (63, 2.0, 0.0, False),
        # but not where who takes of the same time computes.
        (1, 2.0, 1.0, False),
        (1, 3.5, 1.0, False),
        (1, 3.5, 0.6, True),
        # Nor where nobody says it.
        (0, 2.0, None, False),
    ],
)
def test_others_rest_where_they_leave_a_core_to_each_thread(
    busy: int,
    limit: float | None,
    of_group: float | None,
    at_rest: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = System(tmp_path, 64, monkeypatch)
    if limit is not None:
        system.limit(limit)
    ticks = ["100 0 0 0 0 0 0 0"] * busy + ["0 0 0 100 0 0 0 0"] * (64 - busy)
    assert system.rest(ticks, of_group=of_group) is at_rest


def test_where_the_system_does_not_say_it_others_do_not_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_TIMES", tmp_path / "none")
    assert not cores.Others().rest()


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="the system does not say what its cores did")
def test_what_this_process_computes_itself_is_counted_as_its_own() -> None:
    before = cores._times()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    now = cores._times()
    assert before is not None
    assert now is not None
    # Both are counted in ticks of 10 ms, by clocks of their own.
    assert now.own - before.own >= 0.25
    assert now.passed - before.passed >= 0.2 / len(os.sched_getaffinity(0))
    assert now.busy - before.busy >= 0.2
