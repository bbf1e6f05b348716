"""The objects that DVC keeps, by their MD5: a project's cache and a remote. :func:`flows.dvc.store` yields them."""

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from flows.contents import OBJECT
from tasks import atomic
from tasks.errors import TryAgain, UserMistake

_NOT_THERE = (FileNotFoundError, NotADirectoryError)
# What to do about a remote that refuses.
REFUSED = (
    "Look whether it is the right place (`dvc remote list`; of S3 its region and endpoint too), and whether you may do "
    "this there: by credentials that have not expired (environment, `dvc remote modify --local`), or by a folder's "
    "permissions, with no file in its way. S3 refuses a machine whose clock is wrong as well."
)
# Of a bucket that is misspelt, and of a folder in which nothing is mounted.
EMPTY = "has nothing at all: look whether it is mounted, and the right one"
# What S3 says again until somebody mends it; an answer to HEAD has a status alone, 400 of expired credentials too.
S3_REFUSES = re.compile(
    r"\((?:ExpiredToken|InvalidToken|TokenRefreshRequired|InvalidAccessKeyId|SignatureDoesNotMatch|RequestTimeTooSkewed"
    r"|AuthorizationHeaderMalformed|PermanentRedirect|301|400)\) when calling"
)
# The system's words, HTTP's, and the codes of Ceph and MinIO.
FULL = re.compile(r"No space left on device|Disk quota exceeded|Insufficient Storage|(?:Quota ?Exceeded|StorageFull)\)")
# botocore's NoCredentialsError, UnauthorizedSSOTokenError, TokenRetrievalError and ProfileNotFound, google.auth's
# DefaultCredentialsError, azure's ClientAuthenticationError and so on.
_NO_CREDENTIALS = re.compile("Credential|Authentication|SSO|Token|ProfileNotFound")
# aiohttp's ClientResponseError says them as its status; 407 is a proxy's.
_HTTP_REFUSES = (401, 403, 407)
# S3 and its like list as many in one answer; each asked for alone is an answer, and is paid for.
_LISTED = 1000
_READ = 1 << 20


class Store:
    """The objects of a project by their MD5: its cache and, behind it, a remote."""

    def __init__(self, cache: Any, remote: Any | None, name: str | None, place: str | None = None) -> None:
        """``place``: where the remote lies, in whatever words tell it from others."""
        self._cache, self._remote, self.remote, self.place = cache, remote, name, place

    @property
    def folder(self) -> Path:
        """Where the cache lies."""
        return Path(self._cache.path)

    def path(self, md5: str) -> Path:
        """Returns where the object lies in the cache, whether or not it is there."""
        return Path(self._cache.oid_to_path(md5))

    def download(self, md5: str, target: Path) -> bool:
        """Copies the object from the remote to ``target``; returns False where the remote has none.

        Raises :class:`TryAgain` when the remote cannot be asked, :class:`UserMistake` when it lets nobody without other
        credentials or permissions do so.
        """
        if self._remote is None:
            return False
        with self._remote_is_told():
            try:
                # Asking first whether it exists would be a no when an HTTP remote does not answer.
                self._remote.fs.get_file(self._remote.oid_to_path(md5), os.fspath(target))
            except FileNotFoundError:
                return False
        return True

    def lacking(self, md5s: Iterable[str]) -> set[str]:
        """Returns those objects that the remote does not hold, or not whole. Raises as :func:`download` does."""
        return set().union(*self.compare(md5s))

    def compare(self, md5s: Iterable[str]) -> tuple[set[str], set[str]]:
        """Returns those objects that the remote does not hold, and those whose size is another one there than here.

        Asks for each, or lists the remote where many are meant. Raises as :func:`download` does.
        """
        assert self._remote is not None
        wanted = set(md5s)
        with self._remote_is_told():
            listed = len(wanted) >= _LISTED and self._remote.fs.CAN_TRAVERSE
            held = self._list(wanted) if listed else self._ask(sorted(wanted))
        return wanted - held.keys(), {md5 for md5, entry in held.items() if self._differs(md5, entry.get("size"))}

    def _ask(self, wanted: list[str]) -> dict[str, Mapping[str, Any]]:
        assert self._remote is not None
        found = self._remote.fs.info([self._remote.oid_to_path(md5) for md5 in wanted], return_exceptions=True)
        for entry in found:
            if isinstance(entry, Exception) and not isinstance(entry, _NOT_THERE):
                raise entry
        return {md5: entry for md5, entry in zip(wanted, found, strict=True) if isinstance(entry, Mapping)}

    def _list(self, wanted: Collection[str] | None = None) -> dict[str, Mapping[str, Any]]:
        assert self._remote is not None
        # The file system below DVC's own, which would give names alone; that of folders gives names all the same.
        system = self._remote.fs.fs
        entries = system.find(self._remote.path, detail=True)
        places = {md5: place for place in entries if OBJECT.fullmatch(md5 := "".join(str(place).split("/")[-2:]))}
        return {
            md5: entries[place] if isinstance(entries, Mapping) else system.info(place)
            for md5, place in places.items()
            if wanted is None or md5 in wanted
        }

    def _differs(self, md5: str, size: int | None) -> bool:
        # A server of HTTP need not tell a size.
        return size is not None and self.path(md5).is_file() and self.path(md5).stat().st_size != size

    def stored_md5(self, md5: str) -> str | None:
        """Returns the MD5 of the bytes that the remote holds under ``md5``, None where it holds none.

        Reads them all and keeps none. Raises as :func:`download` does.
        """
        assert self._remote is not None
        digest = hashlib.md5(usedforsecurity=False)
        with self._remote_is_told():
            try:
                with self._remote.fs.open(self._remote.oid_to_path(md5), "rb") as stream:
                    while block := stream.read(_READ):
                        digest.update(block)
            except FileNotFoundError:
                return None
        return digest.hexdigest()

    def upload(self, md5s: Iterable[str]) -> None:
        """Copies those objects that the cache holds to the remote. Raises as :func:`download` does."""
        assert self._remote is not None
        with self._remote_is_told(writes=True):
            # Files before the listings that name them.
            for md5 in sorted(md5s, key=lambda md5: md5.endswith(".dir")):
                if self.path(md5).is_file():
                    self._remote.add(os.fspath(self.path(md5)), self._cache.fs, md5, check_exists=False)

    def cached(self) -> dict[str, int]:
        """Returns every object of the cache, with its size in bytes."""
        files = self.folder.glob("??/*")
        return {
            md5: file.stat().st_size
            for file in files
            if OBJECT.fullmatch(md5 := file.parent.name + file.name) and file.is_file()
        }

    def stored(self) -> dict[str, "Stored"]:
        """Returns every object of the remote. Raises as :func:`download` does."""
        assert self._remote is not None
        with self._remote_is_told():
            entries = self._list()
        return {md5: Stored(int(entry.get("size") or 0), _modified(entry)) for md5, entry in entries.items()}

    def is_empty(self) -> bool:
        """Whether the remote can be listed and holds no object at all. Raises as :func:`download` does."""
        assert self._remote is not None
        with self._remote_is_told():
            return bool(self._remote.fs.CAN_TRAVERSE) and not self._holds_any()

    def _holds_any(self) -> bool:
        assert self._remote is not None
        # Folder by folder: to list all of a large remote takes minutes, and memory.
        folders = self._remote.fs.fs.walk(self._remote.path, on_error="raise")
        try:
            return any(OBJECT.fullmatch(Path(folder).name + name) for folder, _, names in folders for name in names)
        except FileNotFoundError:
            return False

    def discard(self, md5s: Iterable[str], remote: bool = False) -> None:
        """Removes objects from the cache, or from the remote; listings go before the files that they name."""
        ordered = sorted(md5s, key=lambda md5: not md5.endswith(".dir"))
        if not remote:
            for md5 in ordered:
                self.path(md5).unlink(missing_ok=True)
            return
        assert self._remote is not None
        with self._remote_is_told():
            from dvc_data.hashfile.db import get_index

            self._remote.fs.remove([self._remote.oid_to_path(md5) for md5 in ordered])
            # DVC remembers what it has pushed, and would not push it once more.
            get_index(self._remote).clear()

    @contextlib.contextmanager
    def _remote_is_told(self, writes: bool = False) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Each kind of remote has exceptions of its own.
            told = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
            if self._is_ours(error, writes):
                raise
            if writes and FULL.search(f"{told}: {error.__cause__}"):
                raise UserMistake(
                    f"DVC's remote '{self.remote}' is full: {told}. Make room there and run again."
                ) from None
            # Of S3 a bucket that does not exist is a FileNotFoundError too. One with a number is the system's: a folder
            # that is not mounted, or what another machine has just removed.
            is_nowhere = isinstance(error, FileNotFoundError) and error.errno is None
            http_refuses = getattr(error, "status", None) in _HTTP_REFUSES
            folder_refuses = isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.EROFS)
            refuses = folder_refuses or isinstance(error, PermissionError) or S3_REFUSES.search(f"{error.__cause__}")
            if is_nowhere or http_refuses or refuses or _NO_CREDENTIALS.search(type(error).__name__):
                raise UserMistake(f"DVC's remote '{self.remote}' refuses: {told}. {REFUSED}") from None
            raise TryAgain(f"DVC's remote '{self.remote}' does not answer: {told}. Run this again later.") from None

    def _is_ours(self, error: Exception, writes: bool) -> bool:
        """Whether it is the cache that somebody else keeps from us, or our own disk that has no room."""
        if isinstance(error, OSError) and error.errno in atomic.FULL:
            return not writes
        name = error.filename if isinstance(error, PermissionError) else None
        return isinstance(name, str | bytes) and Path(os.fsdecode(name)).is_relative_to(self.folder)


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object of a remote: its size in bytes, and when it was written, in seconds since 1970, where that is known."""

    size: int
    modified: float | None


def _modified(entry: Mapping[str, Any]) -> float | None:
    # A folder says mtime, S3 LastModified, Azure last_modified, Google updated.
    for name in ("mtime", "LastModified", "last_modified", "updated", "modified"):
        value = entry.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
