"""``overnight serve``: the server's address, its key, and its end."""

import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from rich.console import Console

from flows.generate import load, load_template, place
from flows.listening import listen
from flows.serve.app import make_app
from flows.serve.guard import KEY, is_loopback
from flows.terminal import print_line
from flows.termination import EXIT_INTERRUPTED
from tasks.errors import UserMistake

# Answers end within this, or are cut off.
_SECONDS_TO_END = 2
# What a request leaves is some hundred objects that point at each other.
_OBJECTS_TO_COLLECT = 1_000


def serve(root: Path, host: str, port: int, out: Console, parallel: int, spin: bool, version: str | None = None) -> int:
    """Serves the INT8 model of the project in ``root`` until Ctrl-C; returns the exit code, 130.

    ``parallel`` texts are written side by side; ``spin`` is that of :class:`lm.runtime.Generator`, ``version`` of
    :func:`flows.generate.place`. Raises :class:`UserMistake` for an address that is not this machine's own without a
    key in the environment, or one that is taken, and as that, :func:`flows.generate.load` and :func:`load_template` do.
    """
    key = os.environ.get(KEY) or None
    if key is None and not is_loopback(host):
        raise UserMistake(
            f"--host {host}: others can reach that, so set {KEY} to a secret that they must send as 'Authorization: "
            "Bearer ...', or serve on 127.0.0.1."
        )
    folder = place(root, lambda line: print_line(out, line), version)
    generator = load(folder, spin)
    template = load_template(folder, generator)
    with _listen(host, port) as listening:
        asked = f"with the key in {KEY}" if key else "without a key"
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
        what = "completions and chat" if template else "completions"
        told = f"Serving {folder} as '{root.name}' at {address}: {what}, {asked}. Ctrl-C stops it."
        print_line(out, told)
        stopped = threading.Event()
        app = make_app(generator, template, root.name, key, parallel, stopped=stopped)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SECONDS_TO_END)
        # A command collects no garbage for as long as most take, and this one goes on for weeks.
        gc.freeze()
        gc.set_threshold(_OBJECTS_TO_COLLECT)
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, stopped).run(sockets=[listening])
        # A second Ctrl-C comes to nothing: Python must not end while the graph runs.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        app.state.writer.stop()
    out.print("Stopped.")
    return EXIT_INTERRUPTED


class _Server(uvicorn.Server):
    """Ends the texts that are written, and those that wait, before it waits for its connections."""

    def __init__(self, config: uvicorn.Config, stopped: threading.Event) -> None:
        super().__init__(config)
        self._stopped = stopped

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopped.set()
        # It tells each answer that it has to cancel with a traceback.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    try:
        found = listen(host, port)
    except UnicodeError:
        raise UserMistake(
            f"--host {host}: no name that a machine can have. Serve on 127.0.0.1, or on 0.0.0.0."
        ) from None
    except OSError as error:
        # Python adds the address to what the system says.
        why = str(error.strerror).split(" (")[0]
        raise UserMistake(
            f"--host {host} --port {port}: cannot listen there ({why}). Choose another --port (0: any free)."
        ) from None
    with found:
        yield found
