"""A PostgreSQL server of one's own on loopback, and a Prefect server on it with authentication, as a team has them."""

import contextlib
import dataclasses
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import needed
from ports import free_port
from ruamel.yaml import YAML

from flows.process import Child

_COMPOSE = Path(__file__).parents[2] / "deployments/compose.yaml"
_SECONDS_TO_START = 120


@dataclasses.dataclass(frozen=True)
class TeamServer:
    """A Prefect server at ``api`` that lets in who says ``auth`` (``user:password``)."""

    api: str
    auth: str
    database: str

    def environment(self) -> dict[str, str]:
        """What a client's environment needs."""
        return {"PREFECT_API_URL": self.api, "PREFECT_API_AUTH_STRING": self.auth}


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Yields the URL of an empty database, for SQLAlchemy with asyncpg."""
    programs = _programs()
    # Not under pytest's own folder, which no other user may enter: PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="overnight-postgres-"))
    try:
        data, password = folder / "data", folder / "password"
        password.write_text(secrets.token_hex(16))
        other = _other_user(folder)
        create = [programs / "initdb", "-D", data, "-U", "prefect", "-A", "scram-sha-256", "--pwfile", password]
        subprocess.run([*other, *create, "--no-sync", "-E", "UTF8"], cwd=folder, check=True, capture_output=True)
        port = free_port()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": "",
            # Nothing here outlives the tests.
            "fsync": "off",
        }
        command = [
            *other,
            programs / "postgres",
            "-D",
            data,
            *(f"-c{name}={value}" for name, value in settings.items()),
        ]
        log = folder / "postgres.log"
        with Child([str(part) for part in command], log, os.environ) as child:
            _wait_for_port(port, child, log)
            yield f"postgresql+asyncpg://prefect:{password.read_text()}@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def prefect_server(home: Path, database: str, port: int | None = None) -> Iterator[TeamServer]:
    """Yields a Prefect server on ``database`` that asks for a password; its own files lie in ``home``.

    With the ``port`` of an earlier one it takes that one's place.
    """
    port = port or free_port()
    home.mkdir(parents=True, exist_ok=True)
    auth = f"overnight:{_password(home)}"
    compose = YAML(typ="safe", pure=True).load(_COMPOSE)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "HOME": str(home),
        # As a team starts it, but for what is of this machine.
        **compose["services"]["server"]["environment"],
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_API_AUTH_STRING": auth,
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--port", str(port)]
    log = home / "server.log"
    with Child(command, log, environment) as child:
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=10).close()
                break
            assert child.wait(0.3) is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
        yield TeamServer(f"http://127.0.0.1:{port}/api", auth, database)


def _password(home: Path) -> str:
    file = home / "password"
    if not file.exists():
        file.write_text(secrets.token_hex(16))
    return file.read_text()


def _programs() -> Path:
    """Returns the folder of initdb and postgres; Debian keeps them out of PATH."""
    candidates = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/opt/homebrew/opt").glob("postgresql*/bin")]
    candidates.sort(
        key=lambda path: [int(part) for part in path.parent.name.split("@")[-1].split(".") if part.isdigit()]
    )
    found = shutil.which("initdb")
    places = [*candidates, *([Path(found).parent] if found else [])]
    for place in reversed(places):
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    needed.missing("PostgreSQL is not installed (Debian: apt-get install postgresql)")


def _other_user(folder: Path) -> list[str]:
    """Returns what to put before a command so that root does not run it, and gives ``folder`` to who does."""
    if os.geteuid() != 0:
        return []
    names = {user.pw_name for user in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    for path in (folder, *folder.iterdir()):
        os.chown(path, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _wait_for_port(port: int, child: Child, log: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        assert child.wait(0.1) is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
