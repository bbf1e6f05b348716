"""What somebody else owns in the project's folder, as one run under ``sudo`` leaves it: told in one line."""

import contextlib
import os
import pwd
import shlex
from collections.abc import Iterator
from pathlib import Path

from tasks.errors import UserMistake


class NotOurs(UserMistake):
    """A file or folder of the project belongs to somebody else, who does not let us at it."""


@contextlib.contextmanager
def others_are_told(root: Path) -> Iterator[None]:
    """Turns a refusal at what somebody else owns below ``root`` into :class:`NotOurs`; other errors pass."""
    try:
        yield
    except PermissionError as error:
        refused = [Path(os.fsdecode(name)).absolute() for name in _names(error)]
        for path in filter(lambda path: path.is_relative_to(root.absolute()), refused):
            if (found := _owned(path, root.absolute())) is not None:
                place, owner = found
                raise NotOurs(
                    f"{path}: no permission: {place} belongs to {name_of(owner)}, and you are {name_of(os.geteuid())}"
                    f"{advice(owner, root.absolute())}"
                ) from error
        raise


def _names(error: PermissionError) -> list[str | bytes]:
    # Of a file that was asked for by its descriptor, it is the number.
    return [name for name in (error.filename, error.filename2) if name and not isinstance(name, int)]


def advice(owner: int, root: Path) -> str:
    """Returns what is told behind the names of the ``owner`` and of who was refused in ``root``."""
    if owner:
        # In a project that several share, what one takes is taken from the others.
        return f". Have {name_of(owner)} let you at it."
    return (
        ", as after one run under sudo. Take back what is in the project: sudo chown -R "
        f"{name_of(os.geteuid())} {shlex.quote(str(root))}"
    )


def _owned(path: Path, root: Path) -> tuple[Path, int] | None:
    """Returns what somebody else owns and keeps from us, with the owner: ``path``, or a folder above it up to ``root``.

    A folder that lets us in has not refused anything, as that of a shared project.
    """
    for place in (path, *path.parents):
        if not place.is_relative_to(root):
            break
        with contextlib.suppress(OSError):
            theirs = (owner := place.stat().st_uid) != os.geteuid()
            # Who may go through a folder may not always change what lies right in it.
            asked = os.W_OK | os.X_OK if place == path.parent else os.X_OK
            if theirs and (place == path or not os.access(place, asked)):
                return place, owner
    return None


def name_of(user: int) -> str:
    """Returns the name of a user, or the number of one who has none."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        # A container's user need not have one.
        return str(user)
