"""``overnight schedule``: a Prefect server and a runner of the nightly flow, kept alive in the foreground.

This process holds the schedule's lock and two supervised children: the server (unless PREFECT_API_URL names one) and
:mod:`flows.runner`, which runs what is due. When it ends, by SIGKILL too, both end with all that descends from them,
and the lock is free only then: whoever gets it knows that no night of an earlier schedule is still at work.
"""

import contextlib
import dataclasses
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from flows import lock, project, runs, server, supervise, timetable
from flows.listening import listen
from flows.process import TOLD_TO_END, Child
from flows.terminal import speaker
from flows.termination import EXIT_INTERRUPTED, EXIT_TERMINATED
from flows.timetable import Timetable
from tasks import paths
from tasks.errors import EXIT_USER_MISTAKE, TryAgain, UserMistake

LOCK = paths.SCRATCH / "schedule.lock"
LOG = paths.SCRATCH / "logs" / "schedule.log"
STARTED = paths.SCRATCH / "schedule.json"
PORT = 4200
# A child that ends sooner than this after its start would only end again.
_SECONDS_TO_PROVE = 30.0
_SECONDS_BETWEEN_LOOKS = 0.2
# Prefect's scheduler looks every few seconds at what there is to plan.
_TIME_TO_PLAN = timedelta(seconds=15)


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for. ``port`` is where the project's own server listens, if it is free."""

    at: str | None = None
    timezone: str | None = None
    cron: str | None = None
    port: int = PORT


class Started(BaseModel):
    """What :mod:`flows.runner` tells once its deployment is on the server."""

    model_config = ConfigDict(frozen=True)

    paused: bool
    # The names of flow runs that had died without a word.
    crashed: list[str]


def schedule(request: Request, out: Console) -> int:
    """Serves the project in the current folder until it is stopped: returns 143 after SIGTERM, 130 after Ctrl-C.

    Raises :class:`tasks.errors.UserMistake` before anything starts, also when another ``overnight schedule`` serves the
    project, :class:`tasks.errors.TryAgain` when the server or the runner cannot be kept alive.
    """
    root = project.find()
    project.committed(root)
    times = timetable.parse(request.at, request.timezone, request.cron)
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with _sole(root, out) as descriptor:
            _keep(root, times, request.port, descriptor, out)
    except (SystemExit, KeyboardInterrupt) as error:
        out.print("Stopped. Nothing starts until the next `overnight schedule`.")
        return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_TERMINATED
    finally:
        signal.signal(signal.SIGTERM, before)


def deployment_name(root: Path, shared: bool) -> str:
    """Returns the name of the deployment; on a server that others share, one that names the machine and the project."""
    if not shared:
        return "nightly"
    return f"nightly-{socket.gethostname()}-{hashlib.sha256(bytes(root)).hexdigest()[:6]}"


def pages(api: str) -> str:
    """Returns where a browser finds the pages of the Prefect server whose ``api`` programs ask."""
    return api.rstrip("/").removesuffix("/api")


def _leave(*_: object) -> None:
    # Every `with` block on the way ends what it started.
    sys.exit(EXIT_TERMINATED)


@contextlib.contextmanager
def _sole(root: Path, out: Console) -> Iterator[int]:
    """Holds the schedule's lock and yields its descriptor; waits for the processes of one that was killed."""
    try:
        with lock.hold(root, "schedule", tell=speaker(out), file=LOCK) as descriptor:
            yield descriptor
    except lock.Held:
        holder = lock.holder(root, LOCK)
        who = f" (process {holder.pid}, since {holder.since:%Y-%m-%d %H:%M})" if holder else ""
        # It serves until somebody stops it, so trying again would not help.
        raise UserMistake(
            f"{root}: another `overnight schedule`{who} serves this project. Stop that one first."
        ) from None


def _keep(root: Path, times: Timetable, port: int, descriptor: int, out: Console) -> NoReturn:
    shared = bool(os.environ.get("PREFECT_API_URL"))
    name = deployment_name(root, shared)
    kept: list[_Kept] = []
    with contextlib.ExitStack() as stack:
        if shared:
            stack.enter_context(server.serve(root, descriptor))
            address = pages(os.environ["PREFECT_API_URL"])
        else:
            # Held open here over the server's restarts: who asks meanwhile waits and is not refused.
            listening = stack.enter_context(_listen(port))
            stood = _Kept("Prefect's server", root / server.LOG, lambda: _stand(root, listening, descriptor), out)
            kept.append(stack.enter_context(stood))
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        (root / STARTED).unlink(missing_ok=True)
        command = [sys.executable, "-m", "flows.runner", name, times.cron, times.timezone]
        environment = _environment(shared)
        runner = _Kept("the runner", root / LOG, lambda: _run(command, root / LOG, environment, descriptor), out)
        kept.append(stack.enter_context(runner))
        told = False
        while True:
            for one in kept:
                one.look()
            if not told and (root / STARTED).exists():
                _tell(out, root, Started.model_validate_json((root / STARTED).read_bytes()), times, address)
                told = True
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _run(command: list[str], log: Path, environment: Mapping[str, str], descriptor: int) -> Child:
    # A night at work has as long to end as a run by hand.
    return Child(command, log, environment, kept=[descriptor], seconds=supervise.STAGE_GRACE_SECONDS)


def _environment(shared: bool) -> dict[str, str]:
    # On a server that others share an automation marks as crashed what sends none, with its machine gone. On our own
    # the runner sees to that.
    heartbeats = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"} if shared else {}
    return {**heartbeats, **os.environ, **_LOGGED}


# The runner has a log of its own, which is where to look when a night did not start.
_LOGGED = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
    "PREFECT_LOGGING_ROOT_LEVEL": "WARNING",
    "PREFECT_LOGGING_COLORS": "false",
    "PYTHONUNBUFFERED": "1",
}


class _Kept:
    """A child that is started again when it ends by itself, which ``out`` is told. Leaving the block ends it."""

    def __init__(self, name: str, log: Path, start: Callable[[], Child], out: Console) -> None:
        self._name, self._log, self._start, self._out = name, log, start, out

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        self._child = self._start()
        return self

    def look(self) -> None:
        """Starts the child again when it has ended.

        Raises :class:`TryAgain` when it ended right after its start, :class:`UserMistake` when it named one as it did.
        """
        code = self._child.wait(0)
        if code is None:
            return
        self._child.stop()
        if time.monotonic() - self._since < _SECONDS_TO_PROVE:
            if code == EXIT_USER_MISTAKE and (told := self._last_line()).startswith("error: "):
                raise UserMistake(told.removeprefix("error: "))
            raise TryAgain(f"{self._name} ended soon after its start (exit code {code}); its log is {self._log}.")
        told = f"{datetime.now():%Y-%m-%d %H:%M:%S} {self._name} ended (exit code {code}); it is started again."
        self._out.print(told)
        self.__enter__()

    def _last_line(self) -> str:
        return self._log.read_text(errors="replace").rstrip().rpartition("\n")[2]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Only the runner has time for it.
        self._child.stop(lambda: speaker(self._out)(f"The night at work was {TOLD_TO_END}"))


def _listen(port: int) -> socket.socket:
    try:
        return listen(server.HOST, port)
    except OSError:
        # Somebody else has it, such as the schedule of another project.
        return listen(server.HOST, 0)


def _stand(root: Path, listening: socket.socket, descriptor: int) -> Child:
    standing, child = server.stand(root, listening, descriptor)
    try:
        standing.wait()
    except BaseException:
        child.stop()
        raise
    server.announce(root, listening.getsockname()[1])
    return child


def _tell(out: Console, root: Path, started: Started, times: Timetable, address: str) -> None:
    for run in started.crashed:
        unbegun = runs.recall(root, run) is None
        how = f"{runs.UNBEGUN}." if unbegun else "`overnight rerun` goes on with it."
        out.print(f"Run {run} had died without a word. It is marked as crashed; {how}", soft_wrap=True)
    now = datetime.now().astimezone()
    start = times.next(now)
    minutes = (start - now + timedelta(seconds=59)) // timedelta(minutes=1)
    told = f"Next run: {start:%A %Y-%m-%d %H:%M} {times.timezone}, in {minutes // 60} h {minutes % 60} min."
    if start - now < _TIME_TO_PLAN:
        told += f" If that is too soon for the server to plan it, {times.next(start):%A %Y-%m-%d %H:%M}."
    out.print(told, soft_wrap=True)
    if started.paused:
        out.print("The deployment is paused: nothing starts until you resume it in Prefect's UI.")
    out.print(f"Runs and their logs: {address}", soft_wrap=True)
    out.print(
        "Stop with Ctrl-C; a run at work ends with it, and `overnight rerun` goes on where it was.", soft_wrap=True
    )
