"""SIGTERM: leaves every ``with`` block in order, and is gone in any case before whoever sent it loses patience.

A machine that shuts down ends everything at the same moment, Prefect's server too. Prefect then tries for minutes to
tell it how the run ended, and complains about that at length.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from flows import supervise

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
# From when no stage is at work any more. The supervisors of what still lives take up to three more; ten is what a
# service manager's patience may be.
_SECONDS_TO_END = 6.5
_SECONDS_BETWEEN_LOOKS = 0.1


class Terminated(BaseException):
    """SIGTERM arrived. No :class:`Exception`, so that nothing on the way takes it for a fault of its own."""


def _tell() -> None:
    print("terminated; `overnight rerun` goes on where this run stopped.", file=sys.stderr, flush=True)


def _wait(tell: Callable[[str], object]) -> None:
    """Returns some seconds after the stages have ended; none of them takes for ever. ``tell`` hears what is awaited."""
    from flows import process

    ended = started = time.monotonic()
    latest, told = started + supervise.STAGE_GRACE_SECONDS + _SECONDS_TO_END, False
    while time.monotonic() < min(latest, ended + _SECONDS_TO_END):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if stages := process.at_work():
            ended = time.monotonic()
            if not told and ended - started > process.SECONDS_UNTOLD:
                told = True
                with contextlib.suppress(OSError):
                    tell(f"{', '.join(stages)}: {process.TOLD_TO_END}")


@contextlib.contextmanager
def sigterm_raises(tell: Callable[[], object] = _tell) -> Iterator[None]:
    """Makes SIGTERM raise :class:`Terminated` in the block; the block then ends the process, with exit code 143.

    ``tell`` prints the last line; after the signal nothing else is printed but what takes its time to end. Prefect has
    a handler of its own while a flow runs, and calls the one that is set here only when it has finished: so a thread
    watches too.
    """
    # Most commands ask this module for an exit code alone.
    from flows import process
    from flows.terminal import speaker

    stderr = sys.stderr
    arrived = threading.Event()
    said = threading.Lock()
    awake, wake = os.pipe()
    os.set_blocking(wake, False)

    def say() -> None:
        if said.acquire(blocking=False):
            # What reads stderr, such as `tee`, has been told to end as well.
            with contextlib.redirect_stderr(stderr), contextlib.suppress(OSError):
                tell()

    def watch() -> None:
        while numbers := os.read(awake, 64):
            if signal.SIGTERM in numbers:
                arrived.set()
                logging.disable(logging.CRITICAL)
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                # At once, and not when Prefect comes to it: a training has a checkpoint to write.
                process.let_go()
                _wait(speaker(Console(file=stderr)))
                say()
                # What still lives is tied to this process by a pipe and ends with it.
                os._exit(EXIT_TERMINATED)
        os.close(awake)

    def terminate(*_: object) -> None:
        arrived.set()
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    other = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True, name="sigterm").start()
    try:
        yield
    except BaseException:
        # Whatever the signal has become on its way through Prefect.
        if not arrived.is_set():
            raise
    finally:
        if not arrived.is_set():
            signal.signal(signal.SIGTERM, before)
            signal.set_wakeup_fd(other)
            os.close(wake)
    if arrived.is_set():
        say()
        sys.exit(EXIT_TERMINATED)
