"""A program that runs a command and leaves nothing behind: ``python -I -S supervise.py FDS SECONDS COMMAND...``.

Started by :mod:`flows.process` between a flow and its child. Its stdin is a pipe that the flow holds open and never
writes to. When the flow ends, for whatever reason and by SIGKILL too, the pipe reaches its end; then, on SIGTERM, and
after the command itself has ended, every process that descends from here is told to end (SIGTERM) and, after
``SECONDS``, killed. A process group would not do: torchrun starts its workers in sessions of their own.

``FDS`` lists file descriptors (``3,4``, or ``-`` for none) that this program keeps open while anything lives but that
the command must not get: the lock of a run stays held until its last process is gone.

Ends with the command's exit code, 128 + N when signal N killed it, and 143 when it was stopped. Standard library only.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable

GRACE_SECONDS = 3.0
# Of a stage: a training that is told to end takes its step to the end and writes a checkpoint of it, in `stop_seconds`
# (20 by default), and its launcher waits 10 s more. All else ends at once.
STAGE_GRACE_SECONDS = 35.0
STOPPED = 128 + signal.SIGTERM
_PR_SET_CHILD_SUBREAPER = 36
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(kept: str, seconds: float, command: list[str]) -> int:
    """Runs ``command`` to its end, or until the flow is gone; returns the exit code described above."""

    def start() -> int:
        return os.posix_spawnp(
            command[0],
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setsigdef=[signal.SIGPIPE, *_STOP_SIGNALS],
        )

    try:
        return supervise(map(int, kept.split(",") if kept != "-" else []), seconds, start)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


def supervise(kept: Iterable[int], seconds: float, start: Callable[[], int]) -> int:
    """Does what the module promises for the child whose process id ``start`` returns."""
    for descriptor in kept:
        os.set_inheritable(descriptor, False)
    # Orphans become children of this process instead of init's, so they stay in sight.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    awake, wake = os.pipe()
    os.set_blocking(awake, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (*_STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    code = _wait(start(), awake)
    _end_descendants(seconds)
    return code


def forget() -> None:
    """Takes back what :func:`supervise` has set for signals: for a child that was forked and starts no program."""
    signal.set_wakeup_fd(-1)
    for number in (*_STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _wait(child: int, awake: int) -> int:
    while True:
        ended = _reap()
        if child in ended:
            return ended[child]
        ready, _, _ = select.select([0, awake], [], [])
        if awake in ready and set(os.read(awake, 4096)) & set(_STOP_SIGNALS):
            return STOPPED
        if 0 in ready and not os.read(0, 4096):
            return STOPPED


def _reap() -> dict[int, int]:
    """Returns the exit codes of the children that have ended since the last call."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            code = os.waitstatus_to_exitcode(status)
            ended[pid] = code if code >= 0 else 128 - code
    return ended


def _end_descendants(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    told: set[int] = set()
    while True:
        _reap()
        # Listed anew each time: a process may start another while it is being told to end.
        alive = _descendants(os.getpid())
        if not alive:
            return
        late = time.monotonic() > deadline
        for pid in alive if late else alive - told:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        told |= alive
        time.sleep(0.02)


def _descendants(root: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                # The name in parentheses may itself hold spaces and parentheses.
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(name))
    found: set[int] = set()
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found.add(pid)
            waiting.append(pid)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))
