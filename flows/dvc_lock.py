"""Other DVC commands at work in the project, such as a `dvc repro` that somebody typed: who they are, and waiting.

DVC has one lock for the whole repository, held for moments, and a table of the files that each command reads and
writes, held for as long as a stage runs. `--wait-for-lock` waits for the first alone.
"""

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from flows import dvc_fork
from tasks.errors import TryAgain

_FOLDER = Path(".dvc/tmp")
_TABLE = _FOLDER / "rwlock"
_REPOSITORY = _FOLDER / "lock"
_LOOKS = 5
_SECONDS_BETWEEN_LOOKS = 0.1
# A `dvc status` and the like are over sooner.
_SECONDS_OF_A_GLANCE = 5.0


class Busy(TryAgain):
    """Another DVC command holds files of the project."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds files: a process, and its command as DVC notes it, ``sys.argv`` in one line."""

    pid: int
    command: str

    @property
    def alive(self) -> bool:
        """Whether the process is still that command: after a restart its number may be anybody's."""
        try:
            line = psutil.Process(self.pid).cmdline()
        except psutil.Error:
            return False
        running = " ".join(line).split()
        # The first word is the program's path, which `python -m` names otherwise.
        words = self.command.split()
        return len(words) < 2 or running[-1:] == words[-1:] or dvc_fork.is_fork(line)

    def __str__(self) -> str:
        program, _, arguments = self.command.partition(" ")
        name = Path(program).parent.name if Path(program).name == "__main__.py" else Path(program).name
        return f"process {self.pid}: {name} {arguments}".rstrip()


def mend(root: Path) -> None:
    """Removes DVC's table of locks where processes that died have left one that stops every later command.

    DVC writes it in place: killed in the middle, it leaves half a file. A writer that lives needs milliseconds. And it
    takes any process with the number of a dead one for that one.
    """
    path = root / _TABLE
    for _ in range(_LOOKS):
        try:
            holders = _holders(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return
        except ValueError:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            continue
        if not holders or any(holder.alive for holder in holders):
            return
        break
    path.unlink(missing_ok=True)


def other(root: Path) -> Holder | None:
    """Returns a living DVC command, other than this process, that holds files of the project."""
    try:
        holders = _holders(json.loads((root / _TABLE).read_bytes()))
    except (OSError, ValueError):
        # Not there, or being written at this moment.
        holders = []
    if (holder := _of_repository(root)) is not None:
        holders.append(holder)
    return next((holder for holder in holders if holder.pid != os.getpid() and holder.alive), None)


def check_others(root: Path, advice: str) -> None:
    """Raises :class:`Busy`, with ``advice``, when another DVC command is at work and does not end within seconds."""
    deadline = time.monotonic() + _SECONDS_OF_A_GLANCE
    while holder := other(root):
        if time.monotonic() > deadline:
            raise Busy(f"{_describe(holder)} {advice}")
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def await_others(root: Path, tell: Callable[[str], object]) -> None:
    """Returns when no other DVC command is at work; tells so once when there is one."""
    told = False
    while holder := other(root):
        if not told:
            tell(f"{_describe(holder)} Waiting for it to end.")
            told = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _describe(holder: Holder) -> str:
    return f"another DVC command is at work in this project ({holder})."


def _holders(table: Any) -> list[Holder]:
    """Returns who is in DVC's table. Raises :class:`ValueError` when it is none."""
    try:
        entries = [*table.get("write", {}).values(), *(one for many in table.get("read", {}).values() for one in many)]
        return [Holder(int(entry["pid"]), str(entry["cmd"])) for entry in entries]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("not DVC's table of locks") from error


def _of_repository(root: Path) -> Holder | None:
    try:
        with (root / _REPOSITORY).open("r+") as file:
            try:
                # As DVC does it, but shared: a DVC command that comes in this moment tries again.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = int(file.read())
                command = psutil.Process(pid).cmdline()
                if dvc_fork.is_fork(command):
                    # Its command line is not its own.
                    return Holder(pid, "dvc")
                # `python -m dvc push` and `python .../bin/dvc push`.
                start = next((place for place, word in enumerate(command) if Path(word).name == "dvc"), 0)
                return Holder(pid, " ".join(command[start:]))
    except (OSError, ValueError, psutil.Error):
        pass
    return None
