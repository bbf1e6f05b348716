"""``overnight serve`` as a process, and as much of a project as it needs."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import tiny
import uvicorn
import waiting
from fastapi import FastAPI

# Seconds until what a test waits for will not come any more.
PATIENCE = 10
# As a client in this process asks.
HERE = "http://127.0.0.1"
# A request that always gets the same text.
GREEDY = {"temperature": 0, "max_tokens": 8, "prompt": "sea"}
until = functools.partial(waiting.until, seconds=PATIENCE)


def lay_out_project(root: Path) -> Path:
    """Makes the folder ``root`` a project without a model; returns it."""
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).write_text("")
    for name in (".dvc", ".git"):
        (root / name).mkdir()
    return root


class Server:
    """``overnight serve`` as a process; ``url`` ends in /v1."""

    def __init__(
        self, root: Path, *arguments: str, program: tuple[str, str] = ("-m", "flows"), **environment: str
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "OVERNIGHT_API_KEY"}
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", "--port", "0", *arguments],
            cwd=root,
            env={**kept, "PYTHONPATH": str(tiny.ROOT), "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"http://\S+/v1", self.said)
        self.url = found.group() if found else ""

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=20)
        return self.process.returncode, self.said + output


@contextlib.contextmanager
def in_this_process(app: FastAPI) -> Iterator[str]:
    """Serves ``app`` in a thread, as the command does; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
