"""What this process waits for in the middle of a model that a mesh cuts: the others, in each of its collectives.

torch.distributed keeps no record of that: gloo's entries in the flight recorder have no end, and those of NCCL tell
what a collective took, but not whether anything stood still meanwhile. All that is called from Python (this code,
FSDP2, a pipeline's schedule) waits in ``Work.wait``, though, or, as DTensor does, in ``wait_tensor``, and there it is
seen. What DistributedDataParallel and compiled code wait for in C++ is not.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

# Whether a thread is in one of the waits that are seen.
_waiting = False


def a_message() -> str | None:
    """Returns, in words, that this process waits; what is on no record then are the messages between two processes."""
    return "a message from or to another process" if _waiting else None


@contextlib.contextmanager
def within(measured: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Has each wait of the calling thread for a collective happen in ``with measured():``."""
    thread = threading.get_ident()

    def seen(wait: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(wait)
        def waiting(*arguments: Any, **named: Any) -> Any:
            # A checkpoint is written in a thread of its own, and holds up nobody.
            if threading.get_ident() != thread:
                return wait(*arguments, **named)
            global _waiting
            _waiting = True
            try:
                with measured():
                    return wait(*arguments, **named)
            finally:
                _waiting = False

        return waiting

    of_work, of_tensors = dist.Work.wait, functional.wait_tensor
    dist.Work.wait, functional.wait_tensor = seen(of_work), seen(of_tensors)  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.Work.wait, functional.wait_tensor = of_work, of_tensors  # type: ignore[method-assign]
