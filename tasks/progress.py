"""How a stage says how far it is: a bar on a terminal, a line every few seconds elsewhere, events for an orchestrator.

A stage holds one :class:`Progress` and calls :meth:`Progress.update` as often as it likes; what is shown is throttled
here. When the environment variable ``OVERNIGHT_EVENTS`` names a file, each event is appended to it as one JSON line and
nothing is drawn: whoever set the variable does the drawing, with :class:`Bar` or :class:`Lines` of this module.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

EVENTS_VARIABLE = "OVERNIGHT_EVENTS"
SECONDS_BETWEEN_EVENTS = 0.2
SECONDS_BETWEEN_LINES = 5.0
# More do not fit beside it on a terminal.
_NUMBERS_IN_A_BAR = 2


@dataclasses.dataclass(frozen=True)
class Event:
    """One point in a stage's life: ``done`` of ``total`` units, ``rate`` units a second, and its own numbers."""

    stage: str
    step: str
    done: float
    total: float
    unit: str
    rate: float
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # One line that the user should read although nothing failed; the numbers are then those of the event before.
    notice: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Event":
        """Returns the event that :meth:`to_json` wrote, in this or another version. Raises ValueError or TypeError."""
        written = json.loads(line)
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in dict(written).items() if name in known})

    def describe_numbers(self, most: int | None = None) -> str:
        """The rate and ``most`` of the stage's own numbers: ``12,345 tokens/s  loss 3.214  rejected 31,102``."""
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2f}"
        numbers = [f"{name.replace('_', ' ')} {_number(value)}" for name, value in list(self.numbers.items())[:most]]
        return "  ".join([f"{rate} {self.unit}/s", *numbers])

    def seconds_left(self) -> float | None:
        """Seconds until ``total`` at the present rate; None while there is no rate yet."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


def _number(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


class Sink(Protocol):
    """Where events go."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A progress bar for a terminal, one line a step of a stage."""

    def __init__(self, console: Console) -> None:
        self._rich = RichProgress(
            TextColumn("[bold]{task.fields[stage]:<9}"),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._tasks: dict[tuple[str, str], object] = {}
        self._rich.start()

    def show(self, event: Event) -> None:
        if event.notice:
            self._rich.console.print(_notice(event), markup=False, highlight=False, soft_wrap=True)
            return
        key = (event.stage, event.step)
        if key not in self._tasks:
            self._tasks[key] = self._rich.add_task(event.step, stage=event.stage, numbers="", total=event.total)
        self._rich.update(
            self._tasks[key],  # type: ignore[arg-type]
            completed=int(event.done),
            total=int(event.total),
            numbers=event.describe_numbers(_NUMBERS_IN_A_BAR),
        )

    def close(self) -> None:
        self._rich.stop()


class Lines:
    """One plain line every few seconds, and one when a step is complete, for logs."""

    def __init__(self, write: Callable[[str], object], every: float = SECONDS_BETWEEN_LINES) -> None:
        self._write = write
        self._every = every
        self._last = 0.0
        self._begun: tuple[str, str] | None = None

    def show(self, event: Event) -> None:
        if event.notice:
            self._write(_notice(event))
            return
        now = time.monotonic()
        if now - self._last < self._every and event.done < event.total:
            return
        self._last = now
        # A step's first report is no pace yet: what it took to connect, or to compile, is in it.
        left = event.seconds_left() if self._begun == (event.stage, event.step) else None
        self._begun = (event.stage, event.step)
        eta = "" if left is None or event.done >= event.total else f"  {left:,.0f} s left"
        done = f"{event.done:,.0f}/{event.total:,.0f} {event.unit}"
        self._write(f"{event.stage:<9} {event.step} {done}  {event.describe_numbers()}{eta}")

    def close(self) -> None:
        pass


def _notice(event: Event) -> str:
    return f"{event.stage:<9} notice: {event.notice}"


class _EventFile:
    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def show(self, event: Event) -> None:
        self._file.write(event.to_json() + "\n")

    def close(self) -> None:
        self._file.close()


def sink_for(console: Console) -> Sink:
    """A bar where ``console`` is a terminal, plain lines where it is not."""
    if console.is_terminal:
        return Bar(console)
    return Lines(lambda line: print(line, file=console.file, flush=True))


class Progress:
    """The progress of one stage. Made by :func:`progress`."""

    def __init__(self, stage: str, sink: Sink) -> None:
        self._stage = stage
        self._sink = sink
        self._step = ""
        self._started = self._shown = time.monotonic()
        self._first = 0.0
        self._last = Event(stage, "", 0, 0, "", 0)

    def begin(self, step: str, done: float = 0) -> None:
        """Starts the clock of ``step``; what an earlier attempt had ``done`` does not count for the rate."""
        self._step, self._first = step, done
        self._started = time.monotonic()
        self._shown = 0.0

    def update(self, done: float, total: float, unit: str, **numbers: float) -> None:
        """Reports ``done`` of ``total`` units; further numbers (a loss, a rejection count) are shown beside.

        While nothing is done (an empty file first, or a ``total`` of 0) there is no progress, and nothing is shown.
        """
        now = time.monotonic()
        if done <= 0 or (now - self._shown < SECONDS_BETWEEN_EVENTS and done < total):
            return
        self._shown = now
        elapsed = max(now - self._started, 1e-6)
        rate = max(done - self._first, 0) / elapsed
        self._last = Event(self._stage, self._step, done, total, unit, rate, numbers)
        self._sink.show(self._last)

    def notice(self, line: str) -> None:
        """Tells the user ``line``: something that is no fault, and that they would want to know."""
        self._sink.show(dataclasses.replace(self._last, step=self._step, notice=line))


@contextlib.contextmanager
def progress(stage: str, shown: bool = True) -> Iterator[Progress]:
    """Yields the stage's :class:`Progress`, drawing on stderr or appending to the file in ``OVERNIGHT_EVENTS``.

    Of the processes that work together on a stage all but one leave ``shown`` off: theirs goes nowhere.
    """
    events = os.environ.get(EVENTS_VARIABLE)
    sink: Sink
    if not shown:
        sink = Lines(lambda line: None)
    elif events:
        sink = _EventFile(Path(events))
    else:
        sink = sink_for(Console(file=sys.stderr))
    try:
        yield Progress(stage, sink)
    finally:
        sink.close()
