"""The frame around every stage's ``main``: where a user's mistake becomes one line and an exit code."""

import contextlib
import errno
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tasks import atomic
from tasks.errors import EXIT_TRY_AGAIN, Refused, TryAgain, UserMistake

# What the kernel says when there are no more processes, threads, sockets or buffers; gloo has only the words.
_SHORT = (errno.EAGAIN, errno.ENOBUFS)
_SHORT_WORDS = tuple(os.strerror(number) for number in _SHORT)


def begin() -> None:
    """Has no garbage collected until :func:`run`, for a program that is about to import torch.

    Importing makes hundreds of thousands of objects that stay. Looking through them again and again is a fifth of it.
    """
    gc.disable()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Has no garbage collected in the block, and what is there behind it never looked through again."""
    gc.disable()
    try:
        yield
    finally:
        _collect_again()


def _collect_again() -> None:
    gc.freeze()
    gc.enable()


def run(stage: Callable[[], None]) -> None:
    """Runs ``stage`` and ends the process: 0 on success, else one ``error:`` line and the error's exit code."""
    _collect_again()
    try:
        stage()
    except (UserMistake, TryAgain, Refused) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in atomic.FULL:
            # A library's own file, such as TensorBoard's.
            where = Path(error.filename) if isinstance(error.filename, str) else Path.cwd()
            full = atomic.disk_full(where)
            print(f"error: {full}", file=sys.stderr, flush=True)
            sys.exit(full.exit_code)
        if not _machine_is_short(error):
            raise
        told = " ".join(str(error).split())
        print(
            f"error: the machine is short of processes or sockets: {told}. Run again later.",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(EXIT_TRY_AGAIN)


def run_rank(main: Callable[[], None]) -> None:
    """Runs ``main`` as :func:`run` does, in one of the processes that work together.

    One that fails ends at once. An exception keeps the model's reducer alive beyond its process group, and taking that
    apart afterwards waits for a thread that waits for the interpreter: two processes in eight hung there for ever.
    """
    try:
        run(main)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _machine_is_short(error: OSError | RuntimeError) -> bool:
    return (isinstance(error, OSError) and error.errno in _SHORT) or any(words in str(error) for words in _SHORT_WORDS)
