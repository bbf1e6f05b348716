"""Ctrl-C while texts are written and wait."""

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
from serving import Server, until

SLOW = """
import time
from flows.cli import app
from lm.runtime import Generator

run = Generator.run

def slow(self, ids, cache, last=False):
    if cache.lengths.any():
        time.sleep({pace})
    logits = run(self, ids, cache, last)
    # No text ends here.
    logits[..., list(self.ends)] = -1e9
    return logits

Generator.run = slow
app(prog_name="overnight")
"""


def serve_slowly(root: Path, pace: float) -> Server:
    """Serves a model that takes ``pace`` seconds for a token."""
    return Server(root, program=("-c", SLOW.format(pace=pace)))


def waiting(server: Server, count: int) -> Callable[[], bool]:
    """Returns whether ``count`` texts are written or wait."""
    return lambda: f"overnight_active_requests {count}.0" in httpx.get(server.url.replace("/v1", "/metrics")).text


def test_ctrl_c_ends_streams_and_those_that_wait_at_once(root: Path) -> None:
    server = serve_slowly(root, 0.1)
    body = {"prompt": "sea", "max_tokens": 600}
    told: list[httpx.Response] = []
    other = threading.Thread(target=lambda: told.append(httpx.post(f"{server.url}/completions", json=body)))
    with httpx.stream("POST", f"{server.url}/completions", json={**body, "stream": True}) as stream:
        events = filter(None, stream.iter_lines())
        next(events)
        other.start()
        until(waiting(server, 2))
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        *_, last = events
    output, _ = server.process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert server.process.returncode == 130
    assert output == "Stopped.\n"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["message"][:27]) == ("server_error", "the server is being stopped")
    other.join()
    assert (told[0].status_code, told[0].json()["error"]) == (503, error)


def test_openais_client_takes_a_stream_that_was_stopped_for_no_whole_one(root: Path) -> None:
    server = serve_slowly(root, 0.1)
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    with client.completions.create(model=root.name, prompt="sea", max_tokens=600, stream=True) as stream:
        next(stream)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is being stopped"):
            list(stream)
    server.process.communicate(timeout=20)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_token_that_takes_its_time_is_waited_for_without_a_traceback(root: Path, signals: int) -> None:
    server = serve_slowly(root, 3)
    body = {"prompt": "sea", "max_tokens": 600, "stream": True}
    with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=20) as stream:
        next(stream.iter_lines())
        for _ in range(signals):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        output, _ = server.process.communicate(timeout=20)
    assert server.process.returncode == 130
    assert output == "Stopped.\n"
