"""Waiting for what a process does."""

import time
from collections.abc import Callable
from typing import TypeVar

_Come = TypeVar("_Come")


def until(come: Callable[[], _Come], seconds: float = 60, told: Callable[[], object] = lambda: "") -> _Come:
    """Returns what ``come`` does, once that is true; fails after so many ``seconds``, with what is ``told`` then."""
    deadline = time.monotonic() + seconds
    while not (found := come()):
        assert time.monotonic() < deadline, told()
        time.sleep(0.01)
    return found
