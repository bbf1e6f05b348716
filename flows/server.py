"""The Prefect server of a run: the one that PREFECT_API_URL names, that of the project's ``overnight schedule`` while
it is at work, or a temporary one. The last two keep their state in the project's own folder.

Prefect reads its settings when it is imported: this module comes first and does not import it.
"""

import base64
import contextlib
import http.client
import json
import os
import socket
import sqlite3
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from flows.listening import listen
from flows.process import Child
from tasks import atomic, paths
from tasks.errors import TryAgain, UserMistake

HOME = paths.SCRATCH / "prefect"
LOG = HOME / "server.log"
DATABASE = "prefect.db"
# Of this machine alone.
HOST = "127.0.0.1"
_ADDRESS = HOME / "address.json"
_AUTH = "PREFECT_API_AUTH_STRING"
_SECONDS_TO_START = 120
_SECONDS_TO_ANSWER = 10
_SECONDS_BETWEEN_LOOKS = 2

# Console logs would mix with the progress bar and repeat what the summary says; the API still gets every log line.
_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_ROOT_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # DVC is the only cache.
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    "PREFECT_TASKS_DEFAULT_PERSIST_RESULT": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
}


class Server:
    """A server that answers, or will soon."""

    def __init__(self, port: int | None, child: Child | None, log: Path) -> None:
        self._port, self._child, self._log = port, child, log

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Holds Prefect's settings for a flow that this process runs on the server.

        A temporary server does not outlive its run, so nobody needs signs of life there; the thread that sends them
        takes up to a second to end.
        """
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        updates = {} if self._child is None else {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings(updates):
            yield

    def let_go(self) -> None:
        """Tells a temporary server to end, and does not wait for it; nothing is asked of it any more."""
        if self._child is not None:
            self._child.let_go()

    def wait(self) -> None:
        """Returns when the server answers.

        Raises :class:`TryAgain` when ours does not come up, :class:`UserMistake` when its database is damaged.
        """
        if self._port is None:
            return
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_SECONDS_BETWEEN_LOOKS)
            try:
                # The socket listens already, so this waits until the server has started.
                connection.request("GET", "/api/health")
                answer = connection.getresponse().status
                break
            except (OSError, http.client.HTTPException) as error:
                ended = self._child is not None and self._child.wait(0) is not None
                if ended or not isinstance(error, TimeoutError) or time.monotonic() > deadline:
                    self._check_database()
                    raise TryAgain(f"Prefect's server did not start ({error}); its log is {self._log}.") from None
            finally:
                connection.close()
        if answer != http.HTTPStatus.OK:
            self._check_database()
            raise TryAgain(f"Prefect's server answered {answer}; its log is {self._log}.")

    def _check_database(self) -> None:
        """Raises :class:`UserMistake` where the database is damaged: the server's log tells nothing of it."""
        database = self._log.with_name(DATABASE)
        try:
            with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as opened:
                told = opened.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.OperationalError:
            # Busy, or not to be opened, which says nothing of what is in it.
            return
        except sqlite3.DatabaseError as error:
            told = str(error)
        if told != "ok":
            raise UserMistake(
                f"{database}: Prefect's database is damaged ({told.splitlines()[-1]}). Move it away: a new one is "
                "made. Prefect's history goes with it, and the retry of nights that are not finished; versions and the "
                "records of runs stay."
            )


@contextlib.contextmanager
def serve(root: Path, kept: int) -> Iterator[Server]:
    """Yields the server of a run, and sets the environment of this process so that Prefect uses it.

    A temporary server starts at once and ends with the block; its supervisor keeps the descriptor ``kept`` open. Raises
    :class:`UserMistake` when PREFECT_API_URL is set and nothing answers there, or it asks for another password.
    """
    os.environ.update(_QUIET)
    log = root / LOG
    if not os.environ.get("PREFECT_API_URL") and (url := standing(root)):
        os.environ["PREFECT_API_URL"] = url
        _go_past_proxies()
        yield Server(None, None, log)
        return
    if os.environ.get("PREFECT_API_URL"):
        check(os.environ["PREFECT_API_URL"])
        yield Server(None, None, log)
        return
    home = _make_home(root)
    log.write_bytes(b"")
    os.environ["PREFECT_HOME"] = str(home)
    with listen(HOST, 0) as listening:
        port = listening.getsockname()[1]
        environment = {**_environment(os.environ), **_own_origins(port)}
        child = Child(_command(listening.fileno()), log, environment, kept=[kept], passed=[listening.fileno()])
    with child:
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        _go_past_proxies()
        yield Server(port, child, log)


def stand(root: Path, listening: socket.socket, kept: int) -> tuple[Server, Child]:
    """Starts the project's lasting server, with Prefect's UI and scheduler, on a socket of this machine.

    Sets the environment of this process so that what it starts uses the server. Runs of the project find it through
    :func:`standing` once :func:`announce` has been called.
    """
    home = _make_home(root)
    port = listening.getsockname()[1]
    os.environ.update(_QUIET)
    os.environ["PREFECT_HOME"] = str(home)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    _go_past_proxies()
    environment = {
        **os.environ,
        **_own_origins(port),
        "PREFECT__SERVER_FINAL": "1",
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
        # Prefect unpacks its pages there; where it is installed may be read-only.
        "PREFECT_UI_STATIC_DIRECTORY": str(home / "ui"),
        # In memory, as is the default, who holds a concurrency slot would be forgotten when the server starts anew.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    log = root / LOG
    child = Child(_command(listening.fileno()), log, environment, kept=[kept], passed=[listening.fileno()])
    return Server(port, child, log), child


def _make_home(root: Path) -> Path:
    home = root / HOME
    home.mkdir(parents=True, exist_ok=True)
    # It holds the webhook's address, and the key to it beside it. What SQLite writes next to it is as private.
    (home / DATABASE).touch(mode=0o600)
    for file in home.glob(f"{DATABASE}*"):
        # Somebody else's is theirs to open or not.
        with contextlib.suppress(PermissionError):
            file.chmod(0o600)
    return home


def _own_origins(port: int) -> dict[str, str]:
    name = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
    own = [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]
    return {name: ",".join(filter(None, [os.environ.get(name), *own]))}


def announce(root: Path, port: int) -> None:
    """Tells the project's runs that its lasting server listens on ``port``."""
    atomic.write_json(root / _ADDRESS, {"port": port})


def standing(root: Path) -> str | None:
    """Returns the API of the project's lasting server, or None when it is not at work."""
    try:
        port = int(json.loads((root / _ADDRESS).read_bytes())["port"])
        url = f"http://127.0.0.1:{port}/api"
        # Past any proxy. The server of another project may listen there by now: its state lies elsewhere.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url}/admin/settings", timeout=_SECONDS_TO_ANSWER) as answer:
            home = json.load(answer)["home"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None
    return url if Path(home) == (root / HOME).absolute() else None


def _go_past_proxies() -> None:
    # A proxy must not get to see, or refuse, what goes to this machine.
    for name in ("NO_PROXY", "no_proxy"):
        given = os.environ.get(name, "").split(",")
        os.environ[name] = ",".join(filter(None, [*given, *({"127.0.0.1"} - set(given))]))


def _command(descriptor: int) -> list[str]:
    return [
        *(sys.executable, "-m", "uvicorn", "--factory", "flows.own_pages:make"),
        *("--fd", str(descriptor), "--log-level", "error", "--lifespan", "on"),
        # Prefect's client keeps a websocket open that uvicorn would wait for.
        *("--timeout-graceful-shutdown", "0"),
    ]


def _environment(outer: Mapping[str, str]) -> dict[str, str]:
    # As SubprocessASGIServer of prefect/server/api/server.py has it.
    return {**outer, "PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


def check(url: str) -> None:
    """Raises :class:`UserMistake` when no Prefect server answers at ``url``, or it asks for another password."""
    if "@" in urllib.parse.urlsplit(url).netloc:
        # It would be printed wherever the address is.
        raise UserMistake(f"PREFECT_API_URL holds a password, or a name. Set {_AUTH} to USER:PASSWORD instead.")
    try:
        # Health is told to everybody, the version to those whom the server lets in.
        for path in ("health", "admin/version"):
            request = urllib.request.Request(f"{url.rstrip('/')}/{path}", headers=_authorization())
            with urllib.request.urlopen(request, timeout=_SECONDS_TO_ANSWER):
                pass
        return
    except urllib.error.HTTPError as error:
        if error.code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            _refuse(url)
            return
        # Something answers; what else is wrong is told by the first real request.
        reason = f"HTTP {error.code}" if error.code == http.HTTPStatus.NOT_FOUND and path == "health" else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error))
    if reason is not None:
        raise UserMistake(
            f"PREFECT_API_URL is {url}, and no Prefect server answers there ({reason}). "
            "Start it with `prefect server start`, or unset PREFECT_API_URL for a temporary one."
        )


def _authorization() -> dict[str, str]:
    # As prefect/client/orchestration has it: the one for a server of one's own, the other for Prefect Cloud.
    if auth := os.environ.get(_AUTH):
        return {"Authorization": f"Basic {base64.b64encode(auth.encode()).decode()}"}
    key = os.environ.get("PREFECT_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _refuse(url: str) -> None:
    """Raises :class:`UserMistake`, unless the password is one that only Prefect knows, from a profile of its own."""
    if not _authorization():
        from prefect.settings import get_current_settings

        api = get_current_settings().api
        if api.auth_string is not None or api.key is not None:
            return
    name = "PREFECT_API_KEY" if _authorization().get("Authorization", "").startswith("Bearer") else _AUTH
    found = "is not the password of" if os.environ.get(name) else "is not set, and a password is asked for by"
    raise UserMistake(f"{name} {found} the Prefect server at {url}. Set it to USER:PASSWORD, as that server has it.")
