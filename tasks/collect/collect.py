"""Copies what is new at the sources into ``data/raw``.

What has gone from a source stays in ``data/raw``: a feed that shows only its latest week still adds up to a corpus.
Times, modes and owners of files play no part, so that equal content at the sources gives equal content here.
"""

import shutil
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from tasks import atomic, paths
from tasks.collect.resolve import FoundFile, resolve
from tasks.errors import BadInput
from tasks.progress import Progress, progress
from tasks.sources import CollectParams, Source

_CHUNK = 2**20


class SourceReport(BaseModel):
    """What collecting found at one source: counts of files, and bytes of all of them together.

    ``kept`` counts the files in ``data/raw`` that the source no longer offers.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    new: int
    changed: int
    unchanged: int
    kept: int
    bytes: int


class CollectReport(BaseModel):
    """What collecting did, source by source in the order of ``params.yaml``."""

    model_config = ConfigDict(frozen=True)

    sources: list[SourceReport]


def collect(params: CollectParams, root: Path = Path()) -> CollectReport:
    """Copies new and changed files into ``data/raw/NAME`` of the project in ``root``, each whole or not at all.

    All sources are looked up before the first file is copied. Raises :class:`BadInput` for a source without a file, a
    file that cannot be read, and names that clash; :class:`DiskFull` when there is no room.
    """
    found = [(source, resolve(source, root)) for source in params.sources]
    total = sum(file.path.stat().st_size for _, files in found for file in files)
    with progress("collect") as shown:
        shown.begin("copy")
        reports: list[SourceReport] = []
        done = 0
        for source, files in found:
            report = _collect_source(source, files, root / paths.RAW / source.name, shown, done, total)
            done += report.bytes
            reports.append(report)
        return CollectReport(sources=reports)


def _collect_source(
    source: Source, files: list[FoundFile], folder: Path, shown: Progress, done: int, total: int
) -> SourceReport:
    counts = {"new": 0, "changed": 0, "unchanged": 0}
    size = 0
    _remove_partials(folder)
    for file in files:
        counts[_copy(source, file, folder / file.name)] += 1
        size += file.path.stat().st_size
        shown.update(done + size, max(total, done + size), "bytes")
    kept = sum(1 for path in folder.rglob("*") if path.is_file()) - len(files)
    return SourceReport(name=source.name, **counts, kept=kept, bytes=size)


def _copy(source: Source, file: FoundFile, target: Path) -> str:
    if target.is_dir():
        raise _in_the_way(source, file, target)
    try:
        content = file.path.open("rb")
    except OSError as error:
        raise _unreadable(source, file, error) from None
    with content:
        try:
            state = "changed" if target.exists() else "new"
            if state == "changed" and _equal(content, target):
                return "unchanged"
            content.seek(0)
        except OSError as error:
            raise _unreadable(source, file, error) from None
        try:
            with atomic.file(target) as copy:
                shutil.copyfileobj(content, copy, _CHUNK)
        except (FileExistsError, NotADirectoryError):
            raise _in_the_way(source, file, target) from None
    return state


def _equal(content: BinaryIO, target: Path) -> bool:
    if Path(content.name).stat().st_size != target.stat().st_size:
        return False
    with target.open("rb") as present:
        while chunk := content.read(_CHUNK):
            if chunk != present.read(_CHUNK):
                return False
        return not present.read(1)


def _remove_partials(folder: Path) -> None:
    for partial in folder.rglob(".partial-*"):
        partial.unlink(missing_ok=True)


def _unreadable(source: Source, file: FoundFile, error: OSError) -> BadInput:
    return BadInput(
        f"source '{source.name}': {file.path}: cannot be read ({error.strerror}). Mend its permissions or remove it."
    )


def _in_the_way(source: Source, file: FoundFile, target: Path) -> BadInput:
    return BadInput(
        f"source '{source.name}': {file.path}: cannot become {target}, because an earlier file or folder is there. "
        f"Remove that from {paths.RAW / source.name}, or give the source another name."
    )
