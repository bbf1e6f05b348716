"""Clients that listen to a text while it is written, and that leave: the model writes a token when a test lets it."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import PATIENCE, in_this_process, until

from flows.serve.app import make_app
from lm.runtime import Done, Request, Tally


class Stub:
    """A model that writes an "a" for each token that it is let, and notes the prompts whose texts were closed."""

    context, vocab_size = 64, 256

    def __init__(self) -> None:
        self.let, self.written, self.closed = threading.Semaphore(0), 0, list[str]()
        self.tally = Tally()

    def generate(self, request: Request, _: object = None) -> Iterator[str]:
        try:
            for _ in range(request.max_new_tokens):
                assert self.let.acquire(timeout=PATIENCE)
                self.written += 1
                yield "a"
        except GeneratorExit:
            self.closed.append(str(request.prompt))
            raise
        return Done("length", 1, request.max_new_tokens)

    def generate_batch(self, requests: list[Request]) -> Iterator[tuple[int, str, Done | None]]:
        for piece in self.generate(requests[0]):
            for number in range(len(requests)):
                yield number, piece, None


@pytest.fixture
def model() -> Stub:
    return Stub()


@pytest.fixture
def url(model: Stub) -> Iterator[str]:
    stub: Any = model
    with in_this_process(make_app(stub, None, "m", None)) as url:
        yield url
        # Nobody is left waiting for a token.
        model.let.release(100_000)


def body(prompt: str, **others: object) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": 100_000, **others}


def until_nobody_waits(url: str, model: Stub) -> None:
    """Lets the model write until the server has noticed who left."""

    def nobody() -> bool:
        model.let.release()
        return active(url) == 0

    until(nobody)


def measured(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def active(url: str) -> float:
    return measured(url, "overnight_active_requests ")


@contextlib.contextmanager
def listening(url: str, prompt: str) -> Iterator[Iterator[str]]:
    """Yields the events of a stream; its client leaves at the end."""
    asked = body(prompt, stream=True)
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=PATIENCE / 2) as stream:
        yield filter(None, stream.iter_lines())


@contextlib.contextmanager
def asking(url: str, asked: dict[str, object]) -> Iterator[None]:
    """Sends a request; its client leaves at the end, and has read nothing."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    try:
        yield
    finally:
        connection.close()


def test_an_event_is_sent_before_the_next_token_is_written(url: str, model: Stub) -> None:
    model.let.release()
    with listening(url, "sea") as events:
        for count in range(1, 4):
            assert '"text": "a"' in next(events)
            assert model.written == count
            model.let.release()


def test_a_stream_whose_client_leaves_is_closed(url: str, model: Stub) -> None:
    model.let.release()
    with listening(url, "sea"):
        assert active(url) == 1
    until_nobody_waits(url, model)
    assert model.closed == ["sea"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_whole_answer_whose_client_leaves_is_closed(url: str, model: Stub, n: int) -> None:
    with asking(url, body("sea", n=n)):
        until(lambda: active(url) == 1)
    until_nobody_waits(url, model)
    assert model.closed == ["sea"]
    assert measured(url, 'overnight_requests_total{path="/v1/completions",status="499"}') == 1
    model.let.release(2)
    answer = httpx.post(f"{url}/v1/completions", json=body("land", max_tokens=2))
    assert answer.json()["choices"][0]["text"] == "aa"


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_while_waiting_waits_no_more(url: str, model: Stub, stream: bool) -> None:
    model.let.release()
    with listening(url, "sea"):
        with asking(url, body("land", stream=stream)):
            until(lambda: active(url) == 2)
        until(lambda: active(url) == 1)
        assert model.closed == []
    until_nobody_waits(url, model)
    assert model.closed == ["sea"]
