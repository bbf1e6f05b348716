"""Tells a process that still works from one that waits for somebody who will never answer."""

import time

import psutil

_LOOKS = 20
# What a process that only waits spends on its timers in an hour is far less.
_SECONDS_OF_WORK = 1.0


class Stalled(Exception):
    """A process and its descendants have neither read, written nor computed for too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"nothing was read or written for {_words(seconds)}, so it was ended")


class Watchdog:
    """Looks now and then at what the process ``pid`` and its descendants have read, written and computed.

    Bytes that go through a socket are not counted by the kernel, but whatever is sent was read from a file before, and
    what arrives is written to one.
    """

    def __init__(self, pid: int, seconds: float) -> None:
        self._pid, self._seconds = pid, seconds
        self._looked = self._moved = time.monotonic()
        self._bytes, self._worked = 0, 0.0

    def check(self) -> None:
        """Raises :class:`Stalled` when nothing has moved for ``seconds``. To be called often."""
        now = time.monotonic()
        if now - self._looked < self._seconds / _LOOKS:
            return
        self._looked = now
        transferred, worked = _activity(self._pid)
        if transferred != self._bytes or abs(worked - self._worked) > _SECONDS_OF_WORK:
            self._bytes, self._worked, self._moved = transferred, worked, now
        elif now - self._moved > self._seconds:
            raise Stalled(self._seconds)


def _activity(pid: int) -> tuple[int, float]:
    """Returns the bytes that a process and its descendants have read and written, and their seconds of CPU time."""
    transferred, worked = 0, 0.0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0.0
    for process in family:
        try:
            with process.oneshot():
                counters, times = process.io_counters(), process.cpu_times()
        except psutil.Error:
            continue
        transferred += counters.read_chars + counters.write_chars
        worked += times.user + times.system
    return transferred, worked


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
