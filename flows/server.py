"""The Prefect server of a run: the one that PREFECT_API_URL names, or a temporary one in the project's own folder.

Prefect reads its settings when it is imported: this module comes first and does not import it.
"""

import contextlib
import http.client
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from flows.process import Child
from tasks import paths
from tasks.errors import TryAgain, UserMistake

HOME = paths.SCRATCH / "prefect"
_SECONDS_TO_START = 120
_SECONDS_TO_ANSWER = 10

# Console logs would mix with the progress bar and repeat what the summary says; the API still gets every log line.
_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_ROOT_LEVEL": "CRITICAL",
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

    def wait(self) -> None:
        """Returns when the server answers. Raises :class:`TryAgain` when a temporary one does not come up."""
        if self._port is None:
            return
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_SECONDS_TO_START)
        try:
            # The socket listens already, so this waits until the server has started, or is refused when it has died.
            connection.request("GET", "/api/health")
            answer = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            raise TryAgain(f"Prefect's temporary server did not start ({error}); its log is {self._log}.") from None
        finally:
            connection.close()
        if answer != http.HTTPStatus.OK:
            raise TryAgain(f"Prefect's temporary server answered {answer}; its log is {self._log}.")


@contextlib.contextmanager
def serve(root: Path, kept: int) -> Iterator[Server]:
    """Yields the server of a run, and sets the environment of this process so that Prefect uses it.

    A temporary server starts at once and ends with the block; its supervisor keeps the descriptor ``kept`` open. Raises
    :class:`UserMistake` when PREFECT_API_URL is set and nothing answers there.
    """
    os.environ.update(_QUIET)
    log = root / HOME / "server.log"
    if os.environ.get("PREFECT_API_URL"):
        _check(os.environ["PREFECT_API_URL"])
        yield Server(None, None, log)
        return
    home = root / HOME
    home.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    os.environ["PREFECT_HOME"] = str(home)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        child = Child(
            _command(listening.fileno()), log, _environment(os.environ), kept=[kept], passed=[listening.fileno()]
        )
    with child:
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        # A proxy must not get to see, or refuse, what goes to this machine.
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
        yield Server(port, child, log)


# Importing the server makes millions of objects that stay; collecting garbage meanwhile costs a fifth of the start.
_UVICORN = "import gc, uvicorn; gc.set_threshold(100_000, 50, 100); uvicorn.main()"


def _command(descriptor: int) -> list[str]:
    return [
        *(sys.executable, "-c", _UVICORN, "--factory", "prefect.server.api.server:create_app"),
        *("--fd", str(descriptor), "--log-level", "error", "--lifespan", "on"),
        # Prefect's client keeps a websocket open that uvicorn would wait for.
        *("--timeout-graceful-shutdown", "0"),
    ]


def _environment(outer: Mapping[str, str]) -> dict[str, str]:
    # As SubprocessASGIServer of prefect/server/api/server.py has it.
    return {**outer, "PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


def _check(url: str) -> None:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=_SECONDS_TO_ANSWER):
            return
    except urllib.error.HTTPError as error:
        # Something answers; whether it lets us in is told by the first real request.
        reason = f"HTTP {error.code}" if error.code == http.HTTPStatus.NOT_FOUND else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error))
    if reason is not None:
        raise UserMistake(
            f"PREFECT_API_URL is {url}, and no Prefect server answers there ({reason}). "
            "Start it with `prefect server start`, or unset PREFECT_API_URL for a temporary one."
        )
