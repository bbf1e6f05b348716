"""From a source's ``uri`` to the files it means."""

import errno
import glob
import importlib.util
import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tasks import paths
from tasks.collect.faults import unreadable
from tasks.errors import BadInput
from tasks.sources import COMPRESSIONS, UNPRINTABLE, Source, has_ending, printable

PACKAGE_SCHEME = "package://"
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class FoundFile:
    """A file at a source: where it lies, and its path below ``data/raw/NAME``."""

    path: Path
    name: PurePosixPath


def resolve(source: Source, start: Path, raw: Path) -> list[FoundFile]:
    """Returns the files that ``source`` means, sorted by name; a relative ``uri`` starts at ``start``.

    A file that is named by itself is taken whatever its ending. A folder is walked, symbolic links included; from a
    folder and from a glob come the files that end in the source's format, also compressed, but for hidden ones.
    Raises :class:`BadInput` when there is no such file, one that cannot be copied under a name of its own, or one in
    ``raw``, where the copies lie; :class:`tasks.errors.TryAgain` when the place does not answer.
    """
    try:
        found = _find(source, start, (raw, start / paths.RAW))
    except OSError as error:
        raise unreadable(source, error.filename or source.uri, error) from None
    if not found:
        endings = ", ".join(f".{source.format}{compression}" for compression in ("", *COMPRESSIONS))
        raise BadInput(
            f"source '{source.name}': {source.uri}: no file ends in {endings}. "
            "Mend the uri or the format in params.yaml, or put the files there."
        )
    return sorted(found, key=lambda file: str(file.name))


def _find(source: Source, start: Path, copies: Sequence[Path]) -> list[FoundFile]:
    place = _place(source, start)
    if _is_glob(place):
        base = _base(place)
        found = _glob(source, place, base)
        searched = base if "**" in place.parts else None
    elif place.is_dir():
        found = [FoundFile(path, _relative(path, place)) for path in _walk(place, source.format, ())]
        searched = place
    else:
        found = [FoundFile(place, PurePosixPath(place.name))]
        searched = None
    _check_names(source, found)
    for file in found:
        _check_regular(source, file.path)
    _check_apart(source, searched, found, copies)
    return found


def _place(source: Source, start: Path) -> Path:
    if source.uri.startswith(PACKAGE_SCHEME):
        return _in_package(source)
    if "://" in source.uri:
        scheme = source.uri.partition("://")[0]
        raise BadInput(
            f"source '{source.name}': {source.uri}: '{scheme}://' is not supported. "
            "Name a file, a folder, a glob or package://PACKAGE/PATH."
        )
    try:
        return start / Path(source.uri).expanduser()
    except RuntimeError:
        raise BadInput(
            f"source '{source.name}': {source.uri}: there is no such user. Mend the uri in params.yaml."
        ) from None


def _in_package(source: Source) -> Path:
    package, _, inside = source.uri.removeprefix(PACKAGE_SCHEME).partition("/")
    top, *below = package.split(".")
    try:
        # Of the top package only, because finding a spec below it would import (and run) the packages on the way.
        spec = importlib.util.find_spec(top)
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"source '{source.name}': {source.uri}: no package '{top}' is installed. "
            "Install it, or mend the uri in params.yaml."
        )
    if not inside:
        raise BadInput(f"source '{source.name}': {source.uri}: no file is named. Write package://{package}/PATH.")
    places = [Path(location, *below, inside) for location in spec.submodule_search_locations]
    return next((place for place in places if place.exists()), places[0])


def _is_glob(place: Path) -> bool:
    return bool(_MAGIC.search(str(place))) and not place.exists()


def _base(pattern: Path) -> Path:
    return Path(*itertools.takewhile(lambda part: not _MAGIC.search(part), pattern.parts))


def _glob(source: Source, pattern: Path, base: Path) -> list[FoundFile]:
    matches = [Path(path) for path in glob.glob(str(pattern), recursive=True)]
    files = [path for path in matches if not path.is_dir()]
    if matches and not files:
        raise BadInput(
            f"source '{source.name}': {source.uri}: only folders match, such as {printable(min(matches))}. "
            f"Write {source.uri.rstrip('/')}/** for the files in and below them."
        )
    return [FoundFile(path, _relative(path, base)) for path in files if has_ending(path.name, source.format)]


def _walk(folder: Path, format_: str, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        # A symbolic link to a folder above: everything below it has been seen.
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if _is_folder(entry):
            yield from _walk(path, format_, (*above, here))
        elif has_ending(entry.name, format_):
            yield path


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        # A link that leads back to itself is no folder; it matters only when its name is that of a text.
        if error.errno == errno.ELOOP:
            return False
        raise


def _relative(path: Path, base: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(base).as_posix())


def _check_regular(source: Source, path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise BadInput(
                f"source '{source.name}': {path}: a link to {printable(os.readlink(path))}, which does not exist. "
                "Mend or remove the link."
            ) from None
        raise BadInput(
            f"source '{source.name}': {path}: no such file. Mend the uri in params.yaml, or put the file there."
        ) from None
    if not stat.S_ISREG(mode):
        raise BadInput(f"source '{source.name}': {path}: not a regular file (a device, socket or pipe). Remove it.")


def _check_apart(source: Source, searched: Path | None, found: Sequence[FoundFile], copies: Sequence[Path]) -> None:
    folders = {file.path.parent.resolve() for file in found}
    for raw in dict.fromkeys(path.resolve() for path in copies):
        if any(folder.is_relative_to(raw) for folder in folders) or (
            searched and raw.is_relative_to(searched.resolve())
        ):
            raise BadInput(
                f"source '{source.name}': {source.uri}: {paths.RAW} lies there, and each night would collect the "
                "copies of the night before. Keep the texts in a folder of their own."
            )


def _check_names(source: Source, found: Sequence[FoundFile]) -> None:
    seen: dict[str, FoundFile] = {}
    for file in found:
        name = str(file.name)
        if odd := UNPRINTABLE.search(name):
            # A line break or an escape sequence would spoil every list and message that names the file.
            kind = "is not UTF-8" if odd[0] >= "\ud800" else "holds a line break or another control character"
            raise BadInput(f"source '{source.name}': {printable(file.path)}: its name {kind}. Rename the file.")
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), file)
        if other is not file:
            raise BadInput(
                f"source '{source.name}': {other.path} and {file.path} would get the same name where case or Unicode "
                "form of names does not count. Rename one of them."
            )
