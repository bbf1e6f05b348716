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
        refused = [Path(os.fsdecode(name)).absolute() for name in (error.filename, error.filename2) if name]
        for path in filter(lambda path: path.is_relative_to(root.absolute()), refused):
            if (found := _owned(path, root.absolute())) is not None:
                place, owner = found
                raise NotOurs(
                    f"{path}: no permission: {place} belongs to {_name(owner)}, and you are {_name(os.geteuid())}, as "
                    "after one run under sudo. Take back what is in the project: sudo chown -R "
                    f"{_name(os.geteuid())} {shlex.quote(str(root.absolute()))}"
                ) from error
        raise


def _owned(path: Path, root: Path) -> tuple[Path, int] | None:
    """Returns what somebody else owns, with the owner: ``path``, or the nearest folder above it, down to ``root``."""
    for place in (path, *path.parents):
        if not place.is_relative_to(root):
            break
        with contextlib.suppress(OSError):
            if (owner := place.stat().st_uid) != os.geteuid():
                return place, owner
    return None


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        # A container's user need not have one.
        return str(user)
