"""From a source's ``uri`` to the files it means."""

import glob
import importlib.util
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tasks.errors import BadInput
from tasks.sources import COMPRESSIONS, Source

PACKAGE_SCHEME = "package://"
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class FoundFile:
    """A file at a source: where it lies, and its path below ``data/raw/NAME``."""

    path: Path
    name: PurePosixPath


def resolve(source: Source, root: Path) -> list[FoundFile]:
    """Returns the files that ``source`` means, sorted by name; a relative ``uri`` starts at ``root``.

    A file that is named by itself is taken whatever its ending. A folder is walked, symbolic links included; from a
    folder and from a glob come the files that end in the source's format, also compressed, but for hidden ones.
    Raises :class:`BadInput` when there is no such file, or one that cannot be copied under a name of its own.
    """
    try:
        found = _find(source, root)
    except OSError as error:
        raise BadInput(
            f"source '{source.name}': {error.filename}: cannot be read ({error.strerror}). Mend its permissions."
        ) from None
    if not found:
        endings = ", ".join(f".{source.format}{compression}" for compression in ("", *COMPRESSIONS))
        raise BadInput(
            f"source '{source.name}': {source.uri}: no file ends in {endings}. "
            "Mend the uri or the format in params.yaml, or put the files there."
        )
    _check_names(source, found)
    return sorted(found, key=lambda file: str(file.name))


def _find(source: Source, root: Path) -> list[FoundFile]:
    place = _place(source, root)
    if _is_glob(place):
        found = _glob(source, place)
    elif place.is_dir():
        found = [FoundFile(path, _relative(path, place)) for path in _walk(place, source.format, ())]
    else:
        found = [FoundFile(place, PurePosixPath(place.name))]
    for file in found:
        _check_regular(source, file.path)
    return found


def _place(source: Source, root: Path) -> Path:
    if source.uri.startswith(PACKAGE_SCHEME):
        return _in_package(source)
    if "://" in source.uri:
        scheme = source.uri.partition("://")[0]
        raise BadInput(
            f"source '{source.name}': {source.uri}: '{scheme}://' is not supported. "
            "Name a file, a folder, a glob or package://PACKAGE/PATH."
        )
    return root / Path(source.uri).expanduser()


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


def _glob(source: Source, pattern: Path) -> list[FoundFile]:
    plain = [part for part in pattern.parts if not _MAGIC.search(part)]
    base = Path(*plain[: next(n for n, part in enumerate(pattern.parts) if _MAGIC.search(part))])
    paths = [Path(path) for path in glob.glob(str(pattern), recursive=True)]
    return [
        FoundFile(path, _relative(path, base))
        for path in paths
        if not path.is_dir() and _has_ending(path.name, source.format)
    ]


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
        if entry.is_dir():
            yield from _walk(path, format_, (*above, here))
        elif _has_ending(entry.name, format_):
            yield path


def _has_ending(name: str, format_: str) -> bool:
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return name.endswith(f".{format_}")


def _relative(path: Path, base: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(base).as_posix())


def _check_regular(source: Source, path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise BadInput(
                f"source '{source.name}': {path}: a link to {os.readlink(path)}, which does not exist. "
                "Mend or remove the link."
            ) from None
        raise BadInput(
            f"source '{source.name}': {path}: no such file. Mend the uri in params.yaml, or put the file there."
        ) from None
    if not stat.S_ISREG(mode):
        raise BadInput(f"source '{source.name}': {path}: not a regular file (a device, socket or pipe). Remove it.")


def _check_names(source: Source, found: list[FoundFile]) -> None:
    seen: dict[str, FoundFile] = {}
    for file in found:
        try:
            name = unicodedata.normalize("NFC", str(file.name)).casefold()
            str(file.name).encode()
        except UnicodeEncodeError:
            raise BadInput(
                f"source '{source.name}': {str(file.path)!r}: its name is not UTF-8. Rename the file."
            ) from None
        other = seen.setdefault(name, file)
        if other is not file:
            raise BadInput(
                f"source '{source.name}': {other.path} and {file.path} would get the same name where case or Unicode "
                "form of names does not count. Rename one of them."
            )
