"""How many cores there are for this process, and whether others compute on them."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_OWN_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_TIMES = Path("/proc/stat")
# What others may take where they are said to rest, in cores, however many there are: a process that computes on one of
# 64 holds up the thread there, for which the other 63 wait. And of how many seconds at least that is said: time is
# counted in ticks of 10 ms.
_AT_REST = 0.2
_SECONDS = 0.25


def available() -> int:
    """Returns how many cores this process may keep busy: those that it is bound to, within what its groups may use.

    A container with ``--cpus 2`` sees all cores of its machine and has the time of two (cgroup v2, ``cpu.max``): a
    thread a core would be held back most of the time, each with what the others wait for.
    """
    bound = len(os.sched_getaffinity(0))
    return max(1, min([bound, *map(int, _limits().values())]))


class Others:
    """What other processes compute on this one's cores from now on."""

    def __init__(self) -> None:
        self._before, self._since = _times(), time.monotonic()

    def rest(self) -> bool:
        """Returns whether since then they have left a core to each of :func:`available` threads, next to nothing aside.

        Of the cores that this process is bound to, and of what its groups may use: others there take of the same share.
        False where the system does not say it. Waits until it can be told.
        """
        time.sleep(max(0.0, self._since + _SECONDS - time.monotonic()))
        before, now, limits = self._before, _times(), _limits()
        if before is None or now is None or not limits.keys() == before.used.keys() == now.used.keys():
            return False
        passed, own, threads = now.passed - before.passed, now.own - before.own, available()
        shares = [(float(len(os.sched_getaffinity(0))), now.busy - before.busy)]
        shares += [(limit, now.used[group] - before.used[group]) for group, limit in limits.items()]
        return passed > 0 and all(share - (used - own) / passed >= threads - _AT_REST for share, used in shares)


@dataclass(frozen=True)
class _Times:
    """Seconds: those that passed, and those that all processes, this one and those of its groups have computed."""

    passed: float
    busy: float
    own: float
    used: dict[Path, float]


def _times() -> _Times | None:
    """Returns the times of this process's cores (proc_stat(5)) and groups, None where the system does not say them."""
    bound = os.sched_getaffinity(0)
    cores = {f"cpu{number}" for number in bound}
    passed = busy = 0
    try:
        lines = _TIMES.read_text().splitlines()
        used = {group: _used(group) for group in _limits()}
    except (OSError, ValueError):
        return None
    for name, *fields in map(str.split, lines):
        if name in cores:
            # The fourth and fifth: idle, and waiting for a disk. The ninth and tenth, guests, are in the first two.
            ticks = [int(field) for field in fields[:8]]
            passed += sum(ticks)
            busy += sum(ticks) - sum(ticks[3:5])
    a_second = os.sysconf("SC_CLK_TCK")
    return _Times(passed / len(bound) / a_second, busy / a_second, sum(os.times()[:2]), used)


def _used(group: Path) -> float:
    """Returns the seconds that all processes of a control group have computed (``cpu.stat``)."""
    entries = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
    return int(entries.get("usage_usec", "")) / 1e6


def _limits() -> dict[Path, float]:
    """Returns this process's control group and those around it that have a limit, with that in cores."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return {}
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return {}
    found = {}
    for group in (_GROUPS / own, *(_GROUPS / own).parents):
        try:
            quota, period = (group / "cpu.max").read_text().split()
            found[group] = int(quota) / int(period)
        except (OSError, ValueError):
            # The outermost group has no such file, and "max" is no limit.
            pass
        if group == _GROUPS:
            break
    return found
