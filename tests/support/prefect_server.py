"""A Prefect server as the project starts one, which a scenario can kill and start again on the same database."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil
from ports import free_port

from flows.process import Child

_ATTEMPTS = 10
# The machine may have ten times as many processes at work as it has cores.
_SECONDS_TO_START = 300


def make_database(file: Path) -> None:
    """Makes Prefect's database, with all its tables, at ``file``, whose name has to be ``prefect.db``."""
    folder = file.with_name("making")
    folder.mkdir(parents=True)
    environment = {**_plain_environment(), "HOME": str(folder), "PREFECT_HOME": str(folder)}
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    (folder / file.name).rename(file)


def _plain_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


class PrefectServer:
    """The server whose files lie in ``home``, and begin with ``database``. Leaving the ``with`` block stops it."""

    def __init__(self, home: Path, database: Path) -> None:
        (home / "prefect").mkdir(parents=True)
        shutil.copy(database, home / "prefect")
        self._port = free_port()
        self._home = home
        self.api = f"http://127.0.0.1:{self._port}/api"

    def __enter__(self) -> "PrefectServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes():
            process.resume()
        self._child.stop()

    def start(self) -> None:
        """Returns when the server answers."""
        environment = {
            **_plain_environment(),
            "HOME": str(self._home),
            "PREFECT_HOME": str(self._home / "prefect"),
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_FINAL": "1",
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{self._port}",
        }
        log = self._home / "server.log"
        command = [
            *(sys.executable, "-m", "uvicorn", "--factory", "flows.own_pages:make", "--port", str(self._port)),
            *("--log-level", "warning", "--timeout-graceful-shutdown", "0"),
        ]
        self._child = Child(command, log, environment)
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            try:
                urllib.request.urlopen(f"{self.api}/health", timeout=60).close()
                return
            except OSError:
                assert self._child.wait(0.5) is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()

    def kill(self) -> None:
        """SIGKILLs it, as a machine that goes down would."""
        assert self._processes()
        for process in self._processes():
            process.kill()
        self._child.stop()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Wakes it for the ``with`` block, and suspends its processes where they are behind that."""
        assert self._processes()
        for process in self._processes():
            process.resume()
        yield
        for process in self._processes():
            process.suspend()

    def _processes(self) -> list[psutil.Process]:
        if self._child.wait(0) is not None:
            return []
        processes: list[psutil.Process] = psutil.Process(self._child.pid).children(recursive=True)
        return processes

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Returns what :func:`ask` does of this server."""
        return ask(self.api, path, body)


def ask(api: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Returns what the server at ``api`` answers: to a GET, or with a ``body`` to a POST; None where that is nothing.

    Asks again, as Prefect's own client does, while another holds the database and the server says 503; it waits for
    that a minute (SQLite's ``busy_timeout``).
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{api}/{path}", data, {"Content-Type": "application/json"})
    for attempt in range(_ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(1)
    raise AssertionError(path)
