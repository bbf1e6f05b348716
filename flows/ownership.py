"""What does not let us at it in the project's folder, as what one run under ``sudo`` leaves: told in one line."""

import contextlib
import os
import pwd
import shlex
from collections.abc import Iterator
from pathlib import Path

from tasks.errors import UserMistake


class NoPermission(UserMistake):
    """A file or folder of the project does not let us at it: somebody else's, or ours by its mode."""


@contextlib.contextmanager
def others_are_told(root: Path) -> Iterator[None]:
    """Turns a refusal below ``root`` by an owner or a mode into :class:`NoPermission`; other errors pass."""
    try:
        yield
    except PermissionError as error:
        refused = [Path(os.fsdecode(name)).absolute() for name in _names(error)]
        for path in filter(lambda path: path.is_relative_to(root.absolute()), refused):
            if (found := _refusing(path, root.absolute())) is not None:
                place, owner = found
                if owner == os.geteuid():
                    raise NoPermission(
                        f"{path}: no permission: the mode of {place}, which is yours, keeps you out. Let yourself in: "
                        f"chmod u+rwX {shlex.quote(str(place))}"
                    ) from error
                raise NoPermission(
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


def _refusing(path: Path, root: Path) -> tuple[Path, int] | None:
    """Returns what keeps us from ``path``, with its owner: ``path``, or a folder above it up to ``root``.

    A folder that lets us in has not refused anything, as that of a shared project. Nor has a file of ours that can be
    read: what nobody is to write, such as DVC's cache, stays so.
    """
    for place in (path, *path.parents):
        if not place.is_relative_to(root):
            break
        with contextlib.suppress(OSError):
            theirs = (owner := place.stat().st_uid) != os.geteuid()
            # Who may go through a folder may not always change what lies right in it.
            asked = os.R_OK if place == path else os.W_OK | os.X_OK if place == path.parent else os.X_OK
            if (theirs and place == path) or not os.access(place, asked):
                return place, owner
    return None


def name_of(user: int) -> str:
    """Returns the name of a user, or the number of one who has none."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        # A container's user need not have one.
        return str(user)
