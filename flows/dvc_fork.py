"""DVC commands without the half second that importing DVC takes, which a run with all stages pays eight times.

A run's first DVC command starts a process that imports DVC and nothing else; this and later commands are its forks, and
so are the questions of :mod:`flows.remotely`, each under a supervisor of its own (:mod:`flows.supervise`). The process
ends with the flow, which has the other end of its socket.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from flows import supervise
from flows.process import Child, Supervisor
from tasks import stage

PREFIX = (sys.executable, "-m", "dvc")
REMOTELY = (sys.executable, "-m", "flows.remotely")
_MOST_BYTES = 2**20
_MOST_DESCRIPTORS = 16
_DIGITS = 16
_SERVE = "import sys; sys.path.append(sys.argv[1]); from flows import dvc_fork; dvc_fork.serve(int(sys.argv[2]))"

# What DVC's commands import when they start.
_MODULES = (
    *("configobj", "dulwich.ignore", "dulwich.worktree", "dvc.cachemgr", "dvc.data_cloud", "dvc.dirs"),
    *("dvc.repo.artifacts", "dvc.repo.datasets", "dvc.repo.graph", "dvc.repo.index", "dvc.repo.metrics"),
    *("dvc.repo.open_repo", "dvc.repo.params", "dvc.repo.plots", "dvc.repo.stage", "dvc.repo.trie"),
    *("dvc.rwlock", "dvc.scm"),
    *("dvc.utils.strictyaml", "dvc_data.hashfile.db.local", "fsspec.implementations.memory", "networkx", "ruamel.yaml"),
)

# The flow's end of the socket, once there is a process at the other one.
_commands: socket.socket | None = None


class DvcChild(Child):
    """A supervised ``python -m dvc ...`` or ``python -m flows.remotely ...``."""

    def _start(
        self,
        command: Sequence[str],
        output: IO[bytes],
        environment: Mapping[str, str],
        kept: tuple[int, ...],
        passed: tuple[int, ...],
    ) -> Supervisor:
        global _commands
        assert tuple(command[: len(PREFIX)]) in (PREFIX, REMOTELY)
        assert not passed
        request = {
            "command": command, "folder": str(Path.cwd()), "environment": dict(environment), "seconds": self._seconds,
        }  # fmt: skip
        for _ in range(2):
            try:
                _commands = _commands or _start_process(environment)
                return _Fork(_commands, request, output, kept)
            except OSError:
                # It was killed, for want of memory perhaps.
                _commands = None
        return super()._start(command, output, environment, kept, passed)


def kind(command: Sequence[str]) -> type[Child]:
    """Returns what starts ``command``: any program, or faster what imports DVC in this interpreter."""
    return DvcChild if tuple(command[: len(PREFIX)]) in (PREFIX, REMOTELY) else Child


def is_fork(command: Sequence[str]) -> bool:
    """Whether a process with this command line is such a fork: it has that of the process from which it was forked."""
    return _SERVE in command


def prepare(environment: Mapping[str, str]) -> None:
    """Starts the process that imports DVC, for a flow that has other things to do until its first DVC command."""
    global _commands
    _commands = _commands or _start_process(environment)


def _start_process(environment: Mapping[str, str]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
    place = Path(__file__).absolute().parents[1]
    with theirs:
        subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE, str(place), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return ours


class _Fork:
    """A supervisor that was forked elsewhere: a pipe tells its process id, then its exit code."""

    def __init__(
        self, commands: socket.socket, request: Mapping[str, object], output: IO[bytes], kept: tuple[int, ...]
    ) -> None:
        alive, stdin = os.pipe()
        self._told, tell = os.pipe()
        self._code: int | None = None
        try:
            socket.send_fds(commands, [json.dumps(request).encode()], [alive, tell, output.fileno(), *kept])
            os.close(tell)
            tell = -1
            self.pid = int(os.read(self._told, _DIGITS) or b"0")
            if not self.pid:
                raise BrokenPipeError("the process that forks has ended")
        except OSError:
            os.close(self._told)
            os.close(stdin)
            raise
        finally:
            os.close(alive)
            if tell >= 0:
                os.close(tell)
        self.stdin: IO[bytes] | None = os.fdopen(stdin, "wb")

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            ready, _, _ = select.select([self._told], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired("dvc", timeout or 0)
            # Killed, it tells nothing.
            self._code = int(os.read(self._told, 16) or -signal.SIGKILL)
            os.close(self._told)
        return self._code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def serve(descriptor: int) -> NoReturn:
    """Forks a DVC command for each request that comes through the socket ``descriptor``, until its other end closes."""
    _import()
    # The kernel forgets the forks that have ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    commands = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(commands, _MOST_BYTES, _MOST_DESCRIPTORS)
        if not message:
            # At once: taking down all that was imported would outlive the flow for a moment.
            os._exit(0)
        if os.fork() == 0:
            commands.close()
            os.setsid()
            _supervise(json.loads(message), *descriptors)
        for one in descriptors:
            os.close(one)


def _import() -> None:
    # No fork looks through what was there before it, which would copy all of that.
    with stage.importing():
        for name in _MODULES:
            importlib.import_module(name)
        from dvc.cli import parser

        parser.get_main_parser()


def _supervise(request: Mapping[str, Any], alive: int, tell: int, output: int, *kept: int) -> None:
    for source, target in ((alive, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(alive)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    # As wide as it is read: what follows, the exit code of a short command, may be in the pipe by then.
    os.write(tell, f"{os.getpid():{_DIGITS}d}".encode())

    def start() -> int:
        return os.fork() or _become(request["command"], tell, *kept)

    code = supervise.supervise(kept, request["seconds"], start)
    os.write(tell, str(code).encode())
    os._exit(0)


def _become(command: list[str], *not_its_own: int) -> NoReturn:
    supervise.forget()
    for descriptor in not_its_own:
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    program, arguments = tuple(command[: len(PREFIX)]), command[len(PREFIX) :]
    sys.argv = ["dvc", *arguments]
    module = importlib.import_module("flows.remotely" if program == REMOTELY else "dvc.cli")
    sys.exit(module.main(arguments))
