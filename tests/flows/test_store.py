"""What is asked of a remote, and how often."""

import errno
import hashlib
import http.server
import re
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.db.local import LocalHashFileDB
from dvc_http import HTTPFileSystem
from dvc_objects.fs.local import LocalFileSystem
from dvc_objects.fs.memory import MemoryFileSystem

from flows import store as stores
from flows.store import Store
from tasks.errors import TryAgain, UserMistake

CONTENT = {hashlib.md5(text).hexdigest(): text for text in (str(number).encode() for number in range(5))}
ABSENT, CUT, *_ = sorted(CONTENT)


@pytest.fixture(params=["tells sizes", "gives names"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose remote lacks one object and has another cut off, with one that nobody asks for."""
    monkeypatch.setattr(stores, "_LISTED", len(CONTENT))
    cache = LocalHashFileDB(LocalFileSystem(), str(tmp_path / "cache"))
    kinds = {
        "tells sizes": lambda: HashFileDB(MemoryFileSystem(global_store=False), "/remote"),
        "gives names": lambda: HashFileDB(LocalFileSystem(), str(tmp_path / "remote")),
    }
    remote = kinds[request.param]()
    cache.add_bytes(CUT, CONTENT[CUT])
    for md5, text in {**CONTENT, "f" * 32: b"another's"}.items():
        if md5 != ABSENT:
            remote.add_bytes(md5, b"" if md5 == CUT else text)
    return Store(cache, remote, "shelf")


def test_many_are_listed_and_few_are_asked_for(store: Store) -> None:
    asked = store._remote.fs  # type: ignore[union-attr]
    with patch.object(asked, "info", wraps=asked.info) as info:
        assert store.compare(CONTENT) == ({ABSENT}, {CUT})
        assert not info.called
        assert store.compare([ABSENT, CUT, max(CONTENT)]) == ({ABSENT}, {CUT})
        assert len(info.call_args.args[0]) == 3


def test_what_cannot_be_listed_is_asked_for(store: Store) -> None:
    asked = store._remote.fs  # type: ignore[union-attr]
    with patch.object(type(asked), "CAN_TRAVERSE", False), patch.object(asked.fs, "find", side_effect=OSError):
        assert store.compare(CONTENT) == ({ABSENT}, {CUT})


def test_one_object_tells_that_a_remote_is_not_empty(store: Store, tmp_path: Path) -> None:
    assert store._remote is not None
    system = store._remote.fs.fs
    with (
        patch.object(system, "info", wraps=system.info) as info,
        patch.object(system, "find", side_effect=AssertionError("all of it is listed")),
    ):
        assert not store.is_empty()
        assert not info.called
    store._remote.path = str(tmp_path / "not there")
    assert store.is_empty()


class NoCredentialsError(Exception):
    """As botocore calls it."""


class UnauthorizedSSOTokenError(Exception):
    """As botocore calls it."""


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("Forbidden"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory"),
        OSError(errno.EROFS, "Read-only file system"),
        NoCredentialsError("Unable to locate credentials."),
        UnauthorizedSSOTokenError("The SSO session associated with this profile has expired."),
        FileNotFoundError("no"),
    ],
)
def test_a_remote_that_refuses_would_refuse_again(store: Store, error: Exception) -> None:
    told = f"^DVC's remote 'shelf' refuses: {re.escape(str(error).rstrip('.'))}\\. Look whether it is the right place "
    with patch.object(store._remote, "add", side_effect=error), pytest.raises(UserMistake, match=told):
        store.upload([CUT])


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers each question with the number that its path begins with."""

    def do_GET(self) -> None:
        self.send_error(int(self.path.split("/")[1]))

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_server_of_http_that_lets_nobody_in_is_told_from_one_that_is_out_of_order(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for status, told in ((401, "refuses"), (403, "refuses"), (407, "refuses"), (400, "does not answer")):
            address = f"http://127.0.0.1:{server.server_port}/{status}"
            cache = LocalHashFileDB(LocalFileSystem(), str(tmp_path))
            shelf = Store(cache, HashFileDB(HTTPFileSystem(url=address), address), "shelf")
            kind = UserMistake if told == "refuses" else TryAgain
            with pytest.raises(kind, match=rf"^DVC's remote 'shelf' {told}: {status}, message="):
                shelf.download(ABSENT, tmp_path / "fetched")
        server.shutdown()


def _from_s3(number: int, code: str, message: str) -> OSError:
    """As s3fs raises what botocore has raised."""
    error = OSError(number, message)
    error.__cause__ = Exception(f"An error occurred ({code}) when calling the HeadObject operation: {message}")
    return error


def test_credentials_that_have_expired_are_a_refusal(store: Store) -> None:
    expired = _from_s3(errno.EINVAL, "400", "Bad Request")
    with (
        patch.object(store._remote, "add", side_effect=expired),
        pytest.raises(UserMistake, match=r"refuses: .*Bad Request\. .* credentials that have not expired"),
    ):
        store.upload([CUT])
    busy = _from_s3(errno.EBUSY, "503", "Slow Down")
    with patch.object(store._remote, "add", side_effect=busy), pytest.raises(TryAgain, match="does not answer"):
        store.upload([CUT])


def test_a_full_remote_is_told_as_one_and_a_full_disk_is_ours(store: Store, tmp_path: Path) -> None:
    for full in (OSError(errno.ENOSPC, "No space left on device"), _from_s3(errno.EIO, "QuotaExceeded", "no room")):
        with (
            patch.object(store._remote, "add", side_effect=full),
            pytest.raises(UserMistake, match=r"^DVC's remote 'shelf' is full: .* Make room there"),
        ):
            store.upload([CUT])
    disk = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "target"))
    with (
        patch.object(store._remote.fs, "get_file", side_effect=disk),  # type: ignore[union-attr]
        pytest.raises(OSError, match="No space left") as raised,
    ):
        store.download(CUT, tmp_path / "target")
    assert raised.value is disk


def test_a_remote_that_is_away_may_come_back(store: Store) -> None:
    error = ConnectionError("no route")
    with (
        patch.object(store._remote, "add", side_effect=error),
        pytest.raises(TryAgain, match="does not answer: no route"),
    ):
        store.upload([CUT])


def test_a_share_that_is_not_mounted_may_come_back(store: Store, tmp_path: Path) -> None:
    (tmp_path / "share").symlink_to(tmp_path / "not mounted")
    away = Store(store._cache, LocalHashFileDB(LocalFileSystem(), str(tmp_path / "share/remote")), "shelf")
    with pytest.raises(TryAgain, match=r"does not answer: .*No such file or directory"):
        away.upload([CUT])


@pytest.mark.parametrize("store", ["gives names"], indirect=True)
def test_what_another_machine_removes_while_the_remote_is_listed_is_no_refusal(store: Store) -> None:
    assert store._remote is not None
    gone = store._remote.oid_to_path(ABSENT)
    with (
        patch.object(store._remote.fs.fs, "find", return_value=[gone]),
        pytest.raises(TryAgain, match=r"does not answer: .*No such file or directory"),
    ):
        store.stored()


def test_a_cache_that_somebody_else_keeps_is_no_refusal_of_the_remote(store: Store) -> None:
    theirs = store.path(ABSENT)
    error = PermissionError(13, "Permission denied", str(theirs))
    with (
        patch.object(store._remote.fs, "get_file", side_effect=error),  # type: ignore[union-attr]
        pytest.raises(PermissionError),
    ):
        store.download(ABSENT, theirs)
