"""What a user can mend, told in one line and by an exit code, whichever command has met it."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from flows.ownership import others_are_told
from flows.termination import EXIT_INTERRUPTED
from tasks.atomic import FULL, disk_full_is_told
from tasks.errors import DiskFull, TryAgain, UserMistake

# Prefect's database and DVC's locks need some room at any moment.
_LEAST_FREE = 32 * 2**20


@contextmanager
def mistakes_are_told(goes_on: bool = False) -> Iterator[None]:
    """Turns what a user can mend into one line and an exit code: 2 for a mistake or a full disk, 75 when waiting helps.

    An interruption has code 130, and says so where the command, given again, ``goes_on`` from there. Raises
    :class:`typer.Exit`.
    """
    try:
        with disk_full_is_told(Path.cwd()), others_are_told(Path.cwd()), _full_stdout_is_told():
            yield
    except typer.Exit:
        raise
    except (UserMistake, TryAgain) as error:
        full = isinstance(error, TryAgain) and _nearly_full()
        typer.echo(f"error: {error}{f' {full}' if full else ''}", err=True)
        raise typer.Exit(UserMistake.exit_code if full else error.exit_code) from None
    except EOFError as error:
        if "marshal" not in str(error):
            raise
        typer.echo(
            "error: a file that Python has compiled is cut off, as a full disk leaves it. Remove them, and run again: "
            "find . -name __pycache__ -prune -exec rm -r {} +",
            err=True,
        )
        raise typer.Exit(UserMistake.exit_code) from None
    except Exception as error:
        # Prefect's server tells in words of its own that it has no room.
        if (full := _nearly_full()) is None:
            raise
        told = (str(error) or type(error).__name__).splitlines()[0]
        typer.echo(f"error: {told.strip().rstrip('.')}. {full}", err=True)
        raise typer.Exit(UserMistake.exit_code) from None
    except KeyboardInterrupt:
        typer.echo(f"interrupted{'; the same command goes on where this one stopped' if goes_on else ''}.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


@contextmanager
def _full_stdout_is_told() -> Iterator[None]:
    """Turns "no space left" into :class:`DiskFull` that names stdout, where that is what has none."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or not _stdout_is_full():
            raise
        raise DiskFull(f"stdout: there is no room where it goes ({error.strerror}). Send it elsewhere.") from error


def _stdout_is_full() -> bool:
    # The error itself names no file. What stdout could not take is still to be written, and a device that is full says
    # so of nothing too: where it is not to blame, no byte reaches it that nobody printed. It may have been closed.
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"")
    except OSError as error:
        return error.errno in FULL
    return False


def _nearly_full() -> str | None:
    """Returns what to tell where there is hardly room on the disk, which then is why something failed; else None."""
    free = shutil.disk_usage(Path.cwd()).free
    if free > _LEAST_FREE:
        return None
    return f"The disk is nearly full ({free / 2**20:,.1f} MiB free). Free some space and run again."
