"""What a run says while it works: to people at a terminal a bar and short lines, to a log lines with their time.

And how every command prints a line of its own.
"""

from collections.abc import Callable
from datetime import datetime

from rich.console import Console

from flows.watch import StageRun
from tasks.progress import Bar, Event, Lines, Sink


class Terminal:
    """Follows a run on ``err``: a bar or lines while a stage works, one line when it has ended."""

    def __init__(self, err: Console) -> None:
        self._err = err
        self._sink: Sink | None = None
        self.runs: list[StageRun] = []

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def say(self, line: str) -> None:
        """Prints ``line`` as it is, however long; where no terminal is, with the time before it."""
        self._close()
        speaker(self._err)(line)

    def began(self, stage: str) -> None:
        pass

    def event(self, event: Event) -> None:
        if self._sink is None:
            self._sink = Bar(self._err) if self._err.is_terminal else Lines(speaker(self._err))
        self._sink.show(event)

    def retrying(self, stage: str, message: str, attempt: int, seconds: float) -> None:
        self.say(f"{stage:<9} {message}; attempt {attempt} starts in {seconds:g} s")

    def ended(self, run: StageRun) -> None:
        self.runs.append(run)
        # Why a stage failed is told once, at the end of the run.
        told = f"{run.seconds:,.1f} s" if run.outcome in ("ran", "failed") else run.message
        self.say(f"{run.stage:<9} {run.outcome:<7} {told}".rstrip())

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None


def print_line(console: Console, line: str, style: str | None = None) -> None:
    """Prints ``line`` as it is: not wrapped, and nothing in it taken for markup."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def speaker(console: Console) -> Callable[[str], None]:
    """Returns a function that prints one line on ``console``, unwrapped; with its time where that is no terminal."""

    def say(line: str) -> None:
        if console.is_terminal:
            print_line(console, line)
        else:
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", file=console.file, flush=True)

    return say
