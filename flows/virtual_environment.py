"""A version's own Python environment, made from its lock file and kept under ``.overnight/environments``.

Its name is the hash of what it is made from, so that versions with equal locks share one.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from flows import process
from flows.git import show
from tasks import atomic, paths
from tasks.errors import TryAgain, UserMistake

FOLDER = paths.SCRATCH / "environments"
_ERROR = re.compile(r"^ERROR: (.+)$", re.MULTILINE)
# A warning of pip's: what it says at its end is that an index without an answer has no such version.
_CUT_OFF = re.compile(r"after connection broken by '(.+)': \S+$", re.MULTILINE)
_OBJECT = re.compile(r"<[^<>]* object at 0x[0-9a-f]+>: ")
_NAME_LENGTH = 16


def build(root: Path, commit: str, version: str, kept: int, tell: Callable[[str], object]) -> Path:
    """Returns the interpreter of the environment of ``commit``; builds it, in minutes, unless it is there.

    ``version`` is the recorded version of Python, of which the first two parts count; ``kept`` a descriptor that stays
    open while the installer lives. Raises :class:`UserMistake` when this Python is not installed or the commit names no
    packages, :class:`TryAgain` when the installation fails.
    """
    lock, project = (show(root, commit, name) for name in (paths.LOCK, "pyproject.toml"))
    if lock is None or project is None:
        raise UserMistake(
            f"{commit[:12]}: this commit lacks {paths.LOCK} or pyproject.toml, so nothing can be installed."
        )
    needed = tuple(tomllib.loads(project.decode()).get("project", {}).get("dependencies", ()))
    interpreter = find(version)
    identity = json.dumps([lock.decode(), needed, version.split(".")[:2]])
    place = root.resolve() / FOLDER / hashlib.sha256(identity.encode()).hexdigest()[:_NAME_LENGTH]
    python = place / "bin" / "python"
    # Beside it and written last: without it the environment is half made.
    ready = place.with_suffix(".ready")
    if ready.exists() and python.exists():
        return python
    tell(f"Installing the version's own {len(needed)} dependencies into {place.relative_to(root.resolve())}.")
    ready.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    constraints = place.with_suffix(".lock")
    atomic.write_bytes(constraints, lock)
    log = place.with_suffix(".log")
    log.write_bytes(b"")
    for command in (
        [str(interpreter), "-m", "venv", str(place)],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(constraints), *needed],
    ):
        code = process.run(command, log, os.environ, lambda event: None, kept=[kept])
        if code != 0:
            reason = _reason(log.read_text(errors="replace")) or f"exit code {code}"
            raise TryAgain(f"the environment of {commit[:12]} cannot be installed: {reason}. The whole log: {log}")
    atomic.write_text(ready, "")
    return python


def _reason(log: str) -> str:
    """Returns why an installation failed, from what pip has said; nothing where it has not said it."""
    told = [error.rstrip(".") for error in _ERROR.findall(log)[:1]]
    if broken := _CUT_OFF.findall(log):
        told.append(f"pip's connection broke: {_OBJECT.sub('', broken[-1])}")
    return ". ".join(told)


def find(version: str) -> Path:
    """Returns an installed interpreter of Python ``version``, this one if it fits. Raises :class:`UserMistake`."""
    minor = ".".join(version.split(".")[:2])
    if minor == f"{sys.version_info.major}.{sys.version_info.minor}":
        return Path(sys.executable)
    found = shutil.which(f"python{minor}")
    if found is None:
        raise UserMistake(f"the version ran on Python {version}, and no python{minor} is in PATH. Install it first.")
    return Path(found)
