"""Files and folders that appear whole or not at all: written beside their final place, synced, then renamed.

A process killed at any moment leaves the old content, or nothing, under the final name. What it had begun lies in a
hidden ``.partial-...`` beside it, and the next attempt removes that first.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tasks.errors import DiskFull

# How the name of what is not finished begins.
PARTIAL = ".partial-"
FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def disk_full_is_told(where: Path) -> Iterator[None]:
    """Turns "no space left" and "quota exceeded" into :class:`DiskFull` that names the place; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise disk_full(where) from error


def disk_full(where: Path) -> DiskFull:
    """Returns what is told of a disk, that of ``where``, on which there is no room."""
    return DiskFull(f"{where}: the disk is full ({_free(where)} free). Free some space and run again.")


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; at the end it is synced and takes the place of ``path`` in one rename."""
    partial = _partial(path, "new")
    with disk_full_is_told(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for entry in sorted(partial.rglob("*")):
                _open_to_others(entry, partial)
                sync(entry)
            sync(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # A folder cannot replace a full one in a single rename: between two renames `path` is missing, which a reader
        # takes for "not there yet". It is never half there.
        old = _partial(path, "old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def _open_to_others(entry: Path, folder: Path) -> None:
    # Some libraries write files that nobody else may read, as if they were to be deleted; who may read the folder may
    # read what is in it.
    if entry.is_file() and not entry.stat().st_mode & 0o077:
        entry.chmod(folder.stat().st_mode & 0o666)


@contextlib.contextmanager
def file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write; at the end it is synced and takes the place of ``path`` in one rename."""
    partial = _partial(path, "new")
    with disk_full_is_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as opened:
                yield opened
                opened.flush()
                os.fsync(opened.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        os.replace(partial, path)
        sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path``, whole or not at all."""
    with file(path) as opened:
        opened.write(content)


def write_text(path: Path, content: str) -> None:
    """Writes ``content`` as UTF-8 to ``path``, whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: object) -> None:
    """Writes ``content`` as indented JSON, keys in the order given, so that equal content gives equal bytes."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def clear(folder: Path) -> None:
    """Removes the files that killed processes have begun in ``folder``, where nobody else may be writing now."""
    for partial in folder.glob(f"{PARTIAL}new-*"):
        partial.unlink(missing_ok=True)


def said_by_the_disk(error: RuntimeError) -> BaseException:
    """Returns the ``OSError`` behind ``error``, or that: torch says that its place in a file is not as expected."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def _partial(path: Path, kind: str) -> Path:
    # A digest of the name, not the name: that may already be as long as a name can be.
    return path.parent / f"{PARTIAL}{kind}-{hashlib.sha256(path.name.encode()).hexdigest()[:16]}"


def sync(path: Path) -> None:
    """Returns when what the file or folder ``path`` holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(where: Path) -> str:
    for place in (where, *where.parents):
        # Another process, whose disk is as full, may just be taking it away.
        with contextlib.suppress(FileNotFoundError):
            return f"{shutil.disk_usage(place).free / 2**20:,.1f} MiB"
    return "nothing"
