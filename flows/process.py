"""Children of the flow that cannot outlive it: each runs under :mod:`flows.supervise`."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import psutil

from flows import supervise
from flows.stall import Watchdog
from tasks.progress import EVENTS_VARIABLE, Event

# What the kernel needs to tear down large processes.
_SECONDS_TO_TEAR_DOWN = 5.0
# What takes longer to end, and may, is told of.
SECONDS_UNTOLD = 3.0
TOLD_TO_END = (
    f"told to end; it may take up to {supervise.STAGE_GRACE_SECONDS:.0f} s: a training writes a checkpoint first."
)
_SECONDS_BETWEEN_LOOKS = 0.05


class Supervisor(Protocol):
    """What watches over a child. The end of its ``stdin`` tells it that the flow is gone; ``pid`` is its own."""

    stdin: IO[bytes] | None
    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Returns the child's exit code. Raises :class:`subprocess.TimeoutExpired` after ``timeout`` seconds."""

    def kill(self) -> None: ...


class Child:
    """A supervised process. Leaving the ``with`` block, however it happens, ends it and all that descends from it."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        kept: Iterable[int] = (),
        passed: Iterable[int] = (),
        seconds: float = supervise.GRACE_SECONDS,
    ) -> None:
        """Starts ``command``, its output appended to ``log``.

        ``passed`` are descriptors that the command inherits; ``kept`` are those that only its supervisor keeps open.
        What has not ended ``seconds`` after it was told to is killed.
        """
        self._seconds = seconds
        kept, passed = tuple(kept), tuple(passed)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._supervisor = self._start(command, output, environment, kept, passed)

    def _start(
        self,
        command: Sequence[str],
        output: IO[bytes],
        environment: Mapping[str, str],
        kept: tuple[int, ...],
        passed: tuple[int, ...],
    ) -> Supervisor:
        return subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(Path(supervise.__file__).absolute())),
                *(",".join(map(str, kept)) or "-", str(self._seconds)),
                *command,
            ],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=(*kept, *passed),
            # Ctrl-C at a terminal reaches the flow alone, which then ends its children in order.
            start_new_session=True,
        )

    def wait(self, seconds: float) -> int | None:
        """Returns the exit code, or None when the process still runs after ``seconds``."""
        try:
            return self._supervisor.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    @property
    def pid(self) -> int:
        """The process that all the others descend from."""
        return self._supervisor.pid

    @property
    def is_gone(self) -> bool:
        """Whether it has ended with all that descends from it; may be asked while another thread waits for that."""
        try:
            return str(psutil.Process(self.pid).status()) == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def let_go(self) -> None:
        """Tells the process and its descendants to end."""
        assert self._supervisor.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._supervisor.stdin.close()

    def stop(self, tell: Callable[[], object] = lambda: None) -> None:
        """Ends the process and its descendants; returns when they are gone. ``tell`` is called if that takes long.

        Interrupted, it leaves them to their supervisor, which gives them the same time.
        """
        self.let_go()
        if self.wait(SECONDS_UNTOLD) is None and self._seconds > SECONDS_UNTOLD:
            # Whoever read it may be gone.
            with contextlib.suppress(OSError):
                tell()
        if self.wait(self._seconds + _SECONDS_TO_TEAR_DOWN - SECONDS_UNTOLD) is None:
            self._supervisor.kill()
            self._supervisor.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def run(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    on_event: Callable[[Event], None],
    kept: Iterable[int] = (),
    kind: type[Child] = Child,
    seconds_to_move: float | None = None,
) -> int:
    """Runs ``command`` to its end and returns its exit code; each progress event of it is handed to ``on_event``.

    Raises :class:`flows.stall.Stalled` when it has moved nothing for ``seconds_to_move`` (None: it may take for ever).
    """
    events = log.with_suffix(".events")
    events.parent.mkdir(parents=True, exist_ok=True)
    events.write_text("")
    told = {**environment, EVENTS_VARIABLE: str(events.absolute())}

    def tell() -> None:
        line = f"{TOLD_TO_END} Ctrl-C does not wait for that, and loses nothing."
        on_event(Event(log.stem, "", 0, 0, "", 0, notice=line))

    def start() -> Child:
        return kind(command, log, told, kept=kept, seconds=supervise.STAGE_GRACE_SECONDS)

    try:
        with events.open(encoding="utf-8") as tail, _at_work(start(), log.stem, tell) as child:
            watchdog = Watchdog(child.pid, seconds_to_move) if seconds_to_move is not None else None
            while True:
                code = child.wait(_SECONDS_BETWEEN_LOOKS)
                for event in _new_events(tail):
                    on_event(event)
                if code is not None:
                    return code
                if watchdog is not None:
                    watchdog.check()
    finally:
        events.unlink(missing_ok=True)


# The name of each is that of its log: its stage.
_children: dict[Child, str] = {}


@contextlib.contextmanager
def _at_work(child: Child, name: str, tell: Callable[[], object]) -> Iterator[Child]:
    _children[child] = name
    try:
        yield child
    finally:
        # No `with child`: that would wait once more for what a second Ctrl-C no longer waits for.
        child.stop(tell)
        del _children[child]


def let_go() -> None:
    """Tells what :func:`run` has started, in whichever thread, to end."""
    for child in tuple(_children):
        child.let_go()


def at_work() -> list[str]:
    """Returns the stages of what has not ended yet."""
    return [name for child, name in tuple(_children.items()) if not child.is_gone]


def _new_events(tail: IO[str]) -> Iterator[Event]:
    while True:
        start = tail.tell()
        line = tail.readline()
        if not line.endswith("\n"):
            # The writer is in the middle of this line.
            tail.seek(start)
            return
        with contextlib.suppress(ValueError, TypeError):
            yield Event.from_json(line)
