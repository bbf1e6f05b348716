"""Copies what is new at the sources into ``data/raw``.

What has gone from a source stays in ``data/raw``: a feed that shows only its latest week still adds up to a corpus. The
user is told of it. Times, modes and owners of files play no part, so that equal content at the sources gives equal
content here.
"""

import errno
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

from tasks import atomic, paths
from tasks.collect.faults import unreadable
from tasks.collect.report import CollectReport, SourceReport
from tasks.collect.resolve import FoundFile, resolve
from tasks.errors import BadInput
from tasks.progress import Progress, progress
from tasks.sources import CollectParams, Source, printable

_CHUNK = 2**20
_NAMES_TOLD = 3


def collect(params: CollectParams, root: Path = Path(), relative_to: Path | None = None) -> CollectReport:
    """Copies new and changed files into ``data/raw/NAME`` of the project in ``root``, each whole or not at all.

    A relative ``uri`` starts at ``relative_to``, at ``root`` without it: a worktree collects what its project would.
    All sources are looked up before the first file is copied. Raises :class:`BadInput` for a source without a file, a
    file that cannot be read, and names that clash; :class:`tasks.errors.TryAgain` for a place that does not answer, and
    :class:`tasks.errors.DiskFull` when there is no room.
    """
    start = root if relative_to is None else relative_to
    found = [(source, resolve(source, start, root / paths.RAW)) for source in params.sources]
    total = sum(_size(source, file) for source, files in found for file in files)
    with progress("collect") as shown:
        shown.begin("read")
        reports: list[SourceReport] = []
        notices: list[str] = []
        done = 0
        for source, files in found:
            folder = root / paths.RAW / source.name
            report = _collect_source(source, files, folder, shown, done, total)
            reports.append(report)
            done += report.bytes
            if gone := _gone(folder, files):
                notices.append(_tell_gone(source, gone))
        unused = _unused(root / paths.RAW, {source.name for source in params.sources})
        notices.extend(_tell_unused(name) for name in unused)
        for notice in notices:
            shown.notice(notice)
        return CollectReport(sources=reports, unused=[printable(name) for name in unused], notices=notices)


def _collect_source(
    source: Source, files: Sequence[FoundFile], folder: Path, shown: Progress, done: int, total: int
) -> SourceReport:
    counts = {"new": 0, "changed": 0, "unchanged": 0}
    size = 0
    _remove_partials(folder)
    for file in files:
        counts[_copy(source, file, folder / file.name)] += 1
        size += _size(source, file)
        shown.update(done + size, max(total, done + size), "bytes")
    return SourceReport(name=source.name, **counts, gone=len(_gone(folder, files)), bytes=size)


def _gone(folder: Path, files: Sequence[FoundFile]) -> list[str]:
    offered = {str(file.name) for file in files}
    present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(set(present) - offered)


def _tell_gone(source: Source, gone: Sequence[str]) -> str:
    folder = paths.RAW / source.name
    names = ", ".join(printable(name) for name in gone[:_NAMES_TOLD])
    more = f" and {len(gone) - _NAMES_TOLD:,} more" if len(gone) > _NAMES_TOLD else ""
    what, those = ("1 file is", "it") if len(gone) == 1 else (f"{len(gone):,} files are", "them")
    return (
        f"{source.name}: {what} no longer at {source.uri} ({names}{more}); kept and still used "
        f"(delete {those} in {folder} to withdraw {those})"
    )


def _unused(raw: Path, names: Collection[str]) -> list[str]:
    if not raw.is_dir():
        return []
    return sorted(path.name for path in raw.iterdir() if path.name not in names and not path.name.startswith("."))


def _tell_unused(name: str) -> str:
    place = printable(paths.RAW / name)
    return f"{place}: no source in params.yaml has this name; kept and not used (delete {place} if it is not to return)"


def _copy(source: Source, file: FoundFile, target: Path) -> str:
    if target.is_dir():
        raise _in_the_way(source, file, target)
    try:
        content = file.path.open("rb")
    except OSError as error:
        raise unreadable(source, file.path, error) from None
    with content:
        try:
            state = "changed" if target.exists() else "new"
            if state == "changed" and _equal(content, target):
                return "unchanged"
            content.seek(0)
        except OSError as error:
            raise unreadable(source, error.filename or file.path, error) from None
        try:
            with atomic.file(target) as copy:
                shutil.copyfileobj(content, copy, _CHUNK)
        except (FileExistsError, NotADirectoryError):
            raise _in_the_way(source, file, target) from None
        except OSError as error:
            if error.errno in _UNWRITABLE:
                raise BadInput(
                    f"{target.parent}: cannot be written ({error.strerror}). Mend its permissions or its owner."
                ) from None
            raise unreadable(source, file.path, error) from None
    return state


# What only writing can meet here, the file to read being open.
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


def _size(source: Source, file: FoundFile) -> int:
    try:
        return file.path.stat().st_size
    except OSError as error:
        raise unreadable(source, file.path, error) from None


def _equal(content: BinaryIO, target: Path) -> bool:
    if Path(content.name).stat().st_size != target.stat().st_size:
        return False
    with target.open("rb") as present:
        while chunk := content.read(_CHUNK):
            if chunk != present.read(_CHUNK):
                return False
        return not present.read(1)


def _remove_partials(folder: Path) -> None:
    for partial in folder.rglob(f"{atomic.PARTIAL}*"):
        partial.unlink(missing_ok=True)


def _in_the_way(source: Source, file: FoundFile, target: Path) -> BadInput:
    return BadInput(
        f"source '{source.name}': {file.path}: cannot become {target}, because an earlier file or folder is there. "
        f"Remove that from {paths.RAW / source.name}, or give the source another name."
    )
