"""Which objects of DVC's cache and remotes a commit needs, listings of folders and the files in them."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from flows import contents, dvc
from flows.contents import Output
from flows.store import EMPTY
from tasks.errors import UserMistake


class Unlisted(UserMistake):
    """The listing of a folder is neither in the cache nor at the remote, so nobody knows which files it holds."""


def needed(store: dvc.Store, outputs: Iterable[Output], known: dict[str, frozenset[str]]) -> set[str]:
    """Returns the MD5 of every object behind ``outputs``. ``known`` keeps what each listing named, for the next call.

    Raises :class:`Unlisted`, and :class:`tasks.errors.TryAgain` when a remote that is needed does not answer.
    """
    found, lost = findable(store, outputs, known)
    if lost:
        raise lost[0]
    return found


def findable(
    store: dvc.Store, outputs: Iterable[Output], known: dict[str, frozenset[str]]
) -> tuple[set[str], list[Unlisted]]:
    """Returns what :func:`needed` does, but for the files of folders whose listing is lost, and a word on each."""
    found: set[str] = set()
    lost: list[Unlisted] = []
    for output in outputs:
        found.add(output.md5)
        if not output.is_folder:
            continue
        try:
            if output.md5 not in known:
                known[output.md5] = frozenset(contents.parse_listing(read(store, output)).values())
            found |= known[output.md5]
        except Unlisted as error:
            lost.append(error)
    return found, lost


def read(store: dvc.Store, output: Output) -> bytes:
    """Returns the object of ``output``, from the cache or the remote: a file's bytes, or a folder's listing.

    Raises as :func:`needed` does.
    """
    digest = output.md5.removesuffix(contents.FOLDER_SUFFIX)
    with tempfile.TemporaryDirectory() as scratch:
        fetched = Path(scratch) / digest
        for place in (store.path(output.md5), fetched):
            if place is fetched and not store.download(output.md5, fetched):
                break
            if place.is_file() and contents.md5_of(place) == digest:
                return place.read_bytes()
    where, cure = "and there is no remote", " `dvc fetch --all-tags` may find it."
    if store.remote:
        where = f"nor at the remote '{store.remote}'"
        if store.is_empty():
            where, cure = f"{where}, which {EMPTY}", ""
    raise Unlisted(f"{output.path} ({output.md5}) is not in DVC's cache, {where}.{cure}")


def sizes(store: dvc.Store, md5s: Iterable[str]) -> Mapping[Path, int]:
    """Returns the files of the cache that hold ``md5s``, with their sizes in bytes; what is not there is left out."""
    return {place: place.stat().st_size for md5 in md5s if (place := store.path(md5)).is_file()}
