"""Who writes next: a CPU that writes two texts at once writes both at half the speed."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from flows.serve.refused import Refused

# So many requests may wait for their turn; at a few seconds each, the last one waits a minute.
MOST_WAITING = 16
_SECONDS_BETWEEN_LOOKS = 0.1


class Turns:
    """Lets one request write at a time, and refuses more than ``most`` that wait."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._turns = threading.Condition()
        # Those that wait and the one whose turn it is, the first come first.
        self._line: list[object] = []

    @contextlib.contextmanager
    def take(self, look: Callable[[], object]) -> Iterator[None]:
        """Returns when it is this one's turn, or raises what ``look`` does, which is called again and again until then.

        Raises :class:`Refused` at once when too many wait.
        """
        ticket = object()
        with self._turns:
            if self.waiting > self._most:
                raise Refused(429, "rate_limit_error", f"{self._most} requests wait already; try again in a while.")
            self._line.append(ticket)
        try:
            with self._turns:
                while self._line[0] is not ticket:
                    self._turns.wait(_SECONDS_BETWEEN_LOOKS)
                    look()
            yield
        finally:
            with self._turns:
                self._line.remove(ticket)
                self._turns.notify_all()

    @property
    def waiting(self) -> int:
        """How many there are, the one whose turn it is among them."""
        return len(self._line)
