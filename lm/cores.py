"""How many cores there are for this process."""

import os
from pathlib import Path

_OWN_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def available() -> int:
    """Returns how many cores this process may keep busy: those that it is bound to, within what its groups may use.

    A container with ``--cpus 2`` sees all cores of its machine and has the time of two (cgroup v2, ``cpu.max``): a
    thread a core would be held back most of the time, each with what the others wait for.
    """
    bound = len(os.sched_getaffinity(0))
    return max(1, min([bound, *map(int, _shares())]))


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
