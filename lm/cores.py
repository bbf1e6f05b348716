"""How many cores there are for this process, and whether others compute on them."""

import os
import time
from pathlib import Path

_OWN_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_TIMES = Path("/proc/stat")
# Of the time that this process may have, what others may take where they are said to rest; and of how many seconds at
# least that is said: time is counted in ticks of 10 ms.
_AT_REST = 0.1
_SECONDS = 0.25


def available() -> int:
    """Returns how many cores this process may keep busy: those that it is bound to, within what its groups may use.

    A container with ``--cpus 2`` sees all cores of its machine and has the time of two (cgroup v2, ``cpu.max``): a
    thread a core would be held back most of the time, each with what the others wait for.
    """
    bound = len(os.sched_getaffinity(0))
    return max(1, min([bound, *map(int, _shares())]))


class Others:
    """What other processes compute on this one's cores from now on."""

    def __init__(self) -> None:
        self._before, self._since = _ticks(), time.monotonic()

    def rest(self) -> bool:
        """Returns whether they have taken next to nothing since then; False where the system does not say it.

        Waits until it can be told.
        """
        time.sleep(max(0.0, self._since + _SECONDS - time.monotonic()))
        (passed, busy, own), (passed_before, busy_before, own_before) = _ticks(), self._before
        # A container's neighbours within take of the same share, of however many cores that is.
        ticks = (passed - passed_before) * available() / len(os.sched_getaffinity(0))
        return ticks > 0 and busy - busy_before - (own - own_before) <= _AT_REST * ticks


def _ticks() -> tuple[int, int, float]:
    """Returns the ticks of this process's cores: all, the busy ones, and those that it took (proc_stat(5))."""
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    passed = busy = 0
    try:
        lines = _TIMES.read_text().splitlines()
    except OSError:
        return 0, 0, 0.0
    for name, *fields in map(str.split, lines):
        if name in cores:
            # The fourth and fifth: idle, and waiting for a disk. The ninth and tenth, guests, are in the first two.
            ticks = [int(field) for field in fields[:8]]
            passed += sum(ticks)
            busy += sum(ticks) - sum(ticks[3:5])
    return passed, busy, sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")


def _shares() -> list[float]:
    """Returns the limits of this process's control group and of those around it, in cores."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    found = []
    for group in (_GROUPS / own, *(_GROUPS / own).parents):
        try:
            quota, period = (group / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))
        except (OSError, ValueError):
            # The outermost group has no such file, and "max" is no limit.
            pass
        if group == _GROUPS:
            break
    return found
