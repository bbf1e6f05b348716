"""Clients that listen to a text while it is written, and that leave: the model writes a token when a test lets it."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from odd import export_over_bytes
from serving import PATIENCE, in_this_process, until

from flows.serve.app import make_app
from lm.cache import Cache
from lm.drafting import Ids
from lm.runtime import Generator
from lm.sampling import Logits


class Letters(Generator):
    """Writes one letter after the other, each when it is let."""

    let: threading.Semaphore

    def run(self, ids: Ids, cache: Cache, last: bool = False) -> Logits:
        assert last
        assert self.let.acquire(timeout=PATIENCE)
        cache.lengths += ids.shape[1]
        logits = np.zeros((len(ids), 1, self.vocab_size), np.float32)
        # By how long each text is. The prompts here have four tokens or five.
        logits[np.arange(len(ids)), 0, ord("a") + (cache.lengths - 4) % 26] = 1e9
        return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_over_bytes(tmp_path_factory.mktemp("int8"))


@pytest.fixture
def model(folder: Path) -> Letters:
    model = Letters(folder)
    model.let, model.context = threading.Semaphore(0), 100_000
    return model


@pytest.fixture
def url(model: Letters) -> Iterator[str]:
    with in_this_process(make_app(model, None, "m", None, parallel=2)) as url:
        yield url
        # Nobody is left waiting for a token.
        model.let.release(100_000)


def body(prompt: str, **others: object) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": 100_000, **others}


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
def asking(url: str, asked: dict[str, object]) -> Iterator[http.client.HTTPConnection]:
    """Sends a request; its client leaves at the end, and has read nothing unless a test does."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()


def written(url: str) -> float:
    """How many tokens there are of texts that have ended or were left."""
    return measured(url, 'overnight_tokens_total{kind="completion"}')


def test_an_event_is_sent_before_the_next_token_is_written(url: str, model: Letters) -> None:
    model.let.release()
    with listening(url, "sea") as events:
        for letter in "abc":
            assert f'"text": "{letter}"' in next(events)
            model.let.release()


def test_a_stream_whose_client_leaves_is_closed(url: str, model: Letters) -> None:
    model.let.release()
    with listening(url, "sea") as events:
        next(events)
        assert active(url) == 1
    until(lambda: active(url) == 0)
    # The token that was being written.
    model.let.release()
    until(lambda: written(url) == 2)


@pytest.mark.parametrize("n", [1, 2])
def test_a_whole_answer_whose_client_leaves_is_closed(url: str, model: Letters, n: int) -> None:
    with asking(url, body("sea", n=n)):
        until(lambda: active(url) == 1)
    until(lambda: active(url) == 0)
    model.let.release()
    until(lambda: written(url) == 1)
    assert measured(url, 'overnight_requests_total{path="/v1/completions",status="499"}') == 1
    model.let.release(2)
    answer = httpx.post(f"{url}/v1/completions", json=body("sea", max_tokens=2))
    assert answer.json()["choices"][0]["text"] == "ab"


def test_there_is_a_thread_for_whoever_asks_while_many_texts_are_written(model: Letters) -> None:
    with in_this_process(make_app(model, None, "m", None, parallel=48)) as url, contextlib.ExitStack() as stack:
        for _ in range(48):
            stack.enter_context(asking(url, body("sea")))
        until(lambda: active(url) == 48)
        assert httpx.get(f"{url}/health", timeout=PATIENCE / 2).json() == {"status": "ok"}
        model.let.release(1000)


def test_of_the_texts_of_a_request_that_is_left_those_count_that_were_begun(url: str, model: Letters) -> None:
    with asking(url, body("sea", n=2)):
        until(lambda: active(url) == 1)
    until(lambda: active(url) == 0)
    model.let.release()
    until(lambda: written(url) == 1)
    assert measured(url, 'overnight_tokens_total{kind="prompt"}') == 4


def test_whoever_comes_later_is_written_beside_the_others_and_may_end_before_them(url: str, model: Letters) -> None:
    model.let.release()
    with listening(url, "sea") as events:
        assert '"text": "a"' in next(events)
        with asking(url, body("isle", max_tokens=2)) as connection:
            until(lambda: active(url) == 2)
            # More than both need: tokens of the first until the second is there, its prompt, and tokens of both.
            model.let.release(10)
            assert json.load(connection.getresponse())["choices"][0]["text"] == "bc"
        for letter in "bcdefghij":
            assert f'"text": "{letter}"' in next(events)


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_while_waiting_waits_no_more(url: str, model: Letters, stream: bool) -> None:
    with asking(url, body("sea")), asking(url, body("sea")):
        until(lambda: active(url) == 2)
        with asking(url, body("land", stream=stream)):
            until(lambda: active(url) == 3)
        until(lambda: active(url) == 2)
        model.let.release(4)
        # Until both are written, and the one that waits for its next token is let.
        until(lambda: model.let._value == 0)
    until(lambda: active(url) == 0)
    model.let.release()
    # Nothing of the one that had to wait.
    until(lambda: measured(url, 'overnight_tokens_total{kind="prompt"}') == 8)


def test_whoever_leaves_while_the_prompt_is_read_makes_room(
    url: str, model: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.batch.PIECE", 2)
    with asking(url, body("sea")):
        until(lambda: active(url) == 1)
    until(lambda: active(url) == 0)
    model.let.release()
    until(lambda: measured(url, 'overnight_tokens_total{kind="prompt"}') == 4)
    assert written(url) == 0
    # One piece is read already.
    model.let.release()
    answer = httpx.post(f"{url}/v1/completions", json=body("sea", max_tokens=1))
    assert answer.json()["choices"][0]["text"] == "a"
