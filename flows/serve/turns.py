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
        # The one whose turn it is among them.
        self.waiting = 0
        self._count, self._turn = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def take(self, look: Callable[[], object]) -> Iterator[None]:
        """Returns when it is this one's turn, or raises what ``look`` does, which is called again and again until then.

        Raises :class:`Refused` at once when too many wait.
        """
        with self._count:
            if self.waiting > self._most:
                raise Refused(429, "rate_limit_error", f"{self._most} requests wait already; try again in a while.")
            self.waiting += 1
        try:
            while not self._turn.acquire(timeout=_SECONDS_BETWEEN_LOOKS):
                look()
            try:
                yield
            finally:
                self._turn.release()
        finally:
            with self._count:
                self.waiting -= 1
