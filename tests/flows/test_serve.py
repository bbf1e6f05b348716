"""A model behind OpenAI's protocol, as the openai client and plain requests meet it."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import openai
import pytest
import tiny
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from serving import GREEDY, HERE, Server, in_this_process, lay_out_project
from together import written_together

from flows.serve.app import make_app
from flows.serve.command import _listen
from flows.serve.metrics import Metrics
from flows.serve.refused import Refused, invalid
from flows.serve.writing import Asked, Writer
from lm.chat_template import ChatTemplate
from lm.runtime import Generator
from lm.sampling import Sampling
from lm.text import Request


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    server = Server(root)
    yield server
    code, output = server.stop()
    assert code == 130, output
    assert "Traceback" not in output
    assert output.endswith("Stopped.\n")


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(root: Path) -> str:
    return "".join(Generator(root / "models/int8").generate(Request("sea", 8, Sampling(temperature=0))))


def test_it_completes_as_generate_does(server: Server, client: openai.OpenAI, root: Path, expected: str) -> None:
    answer = client.completions.create(model=root.name, **GREEDY)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 8)
    assert [model.id for model in client.models.list()] == [root.name]
    assert client.models.retrieve(root.name).id == root.name
    for unknown in ("other", "an/other"):
        with pytest.raises(openai.NotFoundError, match=f"there is no model '{unknown}', but"):
            client.models.retrieve(unknown)
    measured = httpx.get(server.url.replace("/v1", "/metrics")).text
    assert 'path="/v1/models/{wanted:path}",status="404"' in measured
    assert "other" not in measured.replace('path="other"', "")


def test_it_streams_the_same_text_in_pieces(client: openai.OpenAI, root: Path, expected: str) -> None:
    chunks = list(client.completions.create(model=root.name, stream=True, **GREEDY))
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_several_prompts_and_choices_come_in_their_order(client: openai.OpenAI, root: Path) -> None:
    answer = client.completions.create(
        model=root.name, prompt=["sea", "in the night"], n=2, seed=5, max_tokens=6, temperature=1.0, stop=["q"]
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    prompts = ("sea", "sea", "in the night", "in the night")
    requests = [Request(prompt, 6, Sampling(1.0, 0, seed=5 + number), ("q",)) for number, prompt in enumerate(prompts)]
    texts = [text for text, _ in written_together(Generator(root / "models/int8"), requests)]
    assert [choice.text for choice in answer.choices] == texts
    assert len(set(texts)) == 4


def test_prompts_of_tokens_are_read_as_they_are(client: openai.OpenAI, root: Path) -> None:
    model = Generator(root / "models/int8")
    sea, night = ([*model.tokenizer.encode(text).ids] for text in ("sea", "night"))
    requests = [Request(tuple(prompt), 6, Sampling(0)) for prompt in (sea, night)]
    texts = ["".join(model.generate(request)) for request in requests]
    one = client.completions.create(model=root.name, prompt=sea, max_tokens=6, temperature=0)
    assert one.choices[0].text == texts[0]
    assert one.usage is not None
    assert one.usage.prompt_tokens == len(sea)
    both = client.completions.create(model=root.name, prompt=[sea, night], max_tokens=6, temperature=0)
    assert [choice.text for choice in both.choices] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_counts_once_however_many_texts_go_on_with_it(client: openai.OpenAI, root: Path, stream: bool) -> None:
    how: Any = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = client.completions.create(model=root.name, prompt=["sea", "night"], n=3, max_tokens=1, seed=2, **how)
    usage = list(answer)[-1].usage if stream else answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len("sea") + len("night") + 2
    assert usage.completion_tokens <= 6


def test_what_changes_nothing_may_be_sent(client: openai.OpenAI, root: Path, expected: str) -> None:
    neutral: Any = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "echo": False, "best_of": 1}
    answer = client.completions.create(model=root.name, **GREEDY, **neutral, logprobs=None, suffix="", user="me")
    assert answer.choices[0].text == expected


def test_equal_seeds_write_equal_text_and_no_seed_does_not(client: openai.OpenAI, root: Path) -> None:
    def write(**seed: int) -> str:
        return client.completions.create(model=root.name, prompt="sea", max_tokens=12, **seed).choices[0].text

    assert write(seed=7) == write(seed=7) != write(seed=8)
    assert write(seed=-7) == write(seed=-7) != write(seed=-8)
    assert len({write() for _ in range(3)}) > 1


@pytest.mark.parametrize(
    ("changes", "parameter", "message"),
    [
        ({"temperature": -1}, "temperature", "temperature: Input should be greater than or equal to 0"),
        ({"max_tokens": "many"}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"logprobs": 21}, "logprobs", "logprobs: Input should be less than or equal to 20"),
        ({"prompt": "a" * 64}, "prompt", "the prompt has 65 tokens, and the model reads at most 64"),
        ({"prompt": "a" * 10**6}, "prompt", " tokens or more, and the model reads at most 64"),
        ({"prompt": "a" * 64, "stream": True}, "prompt", "the prompt has 65 tokens"),
        ({"prompt": []}, "prompt", "prompt: "),
        ({"prompt": ["a"] * 11, "n": 3}, "n", "n: 3 texts for each prompt of 11 in prompt are more than 32"),
        ({"logprobs": True}, "logprobs", "logprobs: Input should be a valid integer"),
        ({"presence_penalty": 2.5}, "presence_penalty", "presence_penalty: Input should be less than or equal to 2"),
        ({"frequency_penalty": "a"}, "frequency_penalty", "frequency_penalty: Input should be a valid number"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias: Input should be less than or equal to 100"),
        ({"logit_bias": {"sea": 1}}, "logit_bias.sea", "logit_bias.sea: Input should be a valid integer"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "logit_bias: there is no token 5000; the model's are 0 to "),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "logit_bias: there is no token -1; the model's are 0 to "),
        ({"logit_bias": {"05": 1}}, "logit_bias", "logit_bias: Input should be a valid integer"),
        ({"n": True}, "n", "n: Input should be a valid integer"),
        ({"n": "2"}, "n", "n: Input should be a valid integer"),
        ({"temperature": True}, "temperature", "temperature: Input should be a valid number"),
        ({"stream": "yes"}, "stream", "stream: Input should be a valid boolean"),
        ({"max_tokens": 1e3}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"echo": "loudly"}, "echo", "echo: Input should be a valid boolean"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens: Input should be greater than or equal to 0"),
        ({"best_of": 2}, "best_of", "best_of: not supported here"),
        (
            {"prompt": [1, "a"]},
            "prompt",
            "prompt: a text, a list of texts, one of tokens, or one of such lists is needed",
        ),
        (
            {"prompt": {"a": 1}},
            "prompt",
            "prompt: a text, a list of texts, one of tokens, or one of such lists is needed",
        ),
        ({"prompt": [5, 5000]}, "prompt", "prompt: there is no token 5000; the model's are 0 to "),
        ({"prompt": [[5], [-1]]}, "prompt", "prompt: there is no token -1; the model's are 0 to "),
        ({"prompt": [[5], []]}, "prompt[1]", "prompt[1]: List should have at least 1 item"),
        ({"prompt": [[5]] * 33}, "prompt", "prompt: List should have at most 32 items"),
        ({"prompt": "a\ud800"}, "prompt", "prompt: not UTF-8: U+D800 is half a character"),
        ({"prompt": ["sea", "\udfff"]}, "prompt[1]", "prompt[1]: not UTF-8: U+DFFF is half a character"),
        ({"model": "\ud800"}, "model", "model: not UTF-8: "),
        ({"stop": "\ud800"}, "stop", "stop: not UTF-8: "),
        ({"stop": ["a", "\ud800"]}, "stop[1]", "stop[1]: not UTF-8: "),
        ({"stop": ["a"] * 5}, "stop", "stop: List should have at most 4 items after validation, not 5"),
        ({"stop": ["a", 5]}, "stop[1]", "stop[1]: Input should be a valid string"),
        ({"prompt": ["a"] * 33}, "prompt", "prompt: List should have at most 32 items"),
        ({"repetition_penalty": 1e-45, "temperature": 1}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"repetition_penalty": 101}, "repetition_penalty", "less than or equal to 100"),
    ],
)
def test_a_wrong_request_is_told_by_its_parameter(
    server: Server, changes: dict[str, object], parameter: str, message: str
) -> None:
    # With escapes, as Python's json writes them: httpx would send UTF-8.
    body = json.dumps({**GREEDY, **changes})
    answer = httpx.post(f"{server.url}/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == parameter
    assert message in error["message"]


def test_what_nobody_expected_is_an_error_of_the_protocol_and_counted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Generator, "run", fail)
    app = TestClient(make_app(Generator(root / "models/int8"), None, "m", None), HERE, raise_server_exceptions=False)
    for stream in (False, True):
        answer = app.post("/v1/completions", json={**GREEDY, "stream": stream})
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("server_error", None)
        assert error["message"] == "the server failed (MemoryError); where it was started, it says more"
    counted = app.get("/metrics").text
    assert 'overnight_requests_total{path="/v1/completions",status="500"} 2.0' in counted
    assert "overnight_active_requests 0.0" in counted


def test_a_body_that_is_sent_as_something_else_is_told_what_it_is_to_be_sent_as(server: Server) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    wrong = httpx.post(
        f"{server.url}/completions", content='{"temperature": 5}', headers={"Content-Type": "Application/JSON"}
    )
    assert wrong.json()["error"]["param"] in ("temperature", "prompt")
    told = httpx.post(f"{server.url}/completions", content=json.dumps(GREEDY), headers=form)
    assert told.status_code == 400
    assert told.json()["error"]["message"] == (
        "the body is of the Content-Type 'application/x-www-form-urlencoded', and is no request; send it as "
        "application/json"
    )


def test_a_body_longer_than_any_request_is_refused_while_it_comes_in(server: Server) -> None:
    sent = []

    def pieces() -> Iterator[bytes]:
        for number in range(1024):
            sent.append(number)
            yield b" " * 2**20

    # It hangs up.
    with contextlib.suppress(httpx.TransportError):
        httpx.post(f"{server.url}/completions", content=pieces(), headers={"Content-Type": "application/json"})
    assert len(sent) < 512
    told = httpx.post(f"{server.url}/completions", content=b" " * 2**22, headers={"Content-Type": "application/json"})
    assert told.status_code == 413
    assert "POST /v1/completions: the body is longer than " in told.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "wrong", "parameter"),
    [
        ("chat/completions", {"messages": [0] * 9999}, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "user", "content": [0] * 9999}]}, "messages[0].content"),
        ("completions", {"prompt": [[0.5] * 9999]}, "prompt"),
        ("completions", {"prompt": "a", "logit_bias": {f"x{n}": 0 for n in range(19999)}}, "logit_bias"),
        ("completions", {f"x{n}": 0 for n in range(9999)}, None),
        ("chat/completions", {"messages": [{f"x{n}": 0 for n in range(9999)}]}, "messages[0]"),
    ],
)
def test_of_a_body_that_is_all_wrong_the_first_fault_is_told(
    path: str, wrong: dict[str, object], parameter: str | None, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, faults = Generator(root / "models/int8"), list[Any]()

    def seen(error: RequestValidationError) -> Refused:
        faults.extend(error.errors())
        return invalid(error)

    monkeypatch.setattr("flows.serve.refused.invalid", seen)
    app = TestClient(make_app(model, ChatTemplate(tiny.CHATML, {}, model.tokenizer, "t"), "m", None), HERE)
    told = app.post(f"/v1/{path}", json=wrong)
    assert told.status_code == 400
    assert (told.json()["error"]["param"] or "").startswith(parameter or "")
    assert len(faults) < 10


class Breaking(Generator):
    """Its fifth run fails."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.runs = 0

    def run(self, *arguments: Any, **how: Any) -> Any:
        self.runs += 1
        if self.runs == 5:
            raise MemoryError
        return super().run(*arguments, **how)


def test_a_stream_that_breaks_off_says_so_and_the_fault_is_shown_where_the_server_was_started(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with in_this_process(make_app(Breaking(root / "models/int8"), None, "m", None)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match=r"the server failed \(MemoryError\)"):
            list(client.completions.create(model="m", stream=True, **GREEDY))
        # And the next one is written.
        assert client.completions.create(model="m", **GREEDY).choices[0].finish_reason == "length"
    assert "\nMemoryError\n" in capfd.readouterr().err


def test_malformed_json_another_model_and_unknown_paths_are_errors_of_the_protocol(
    server: Server, client: openai.OpenAI
) -> None:
    malformed = httpx.post(
        f"{server.url}/completions", content=b'{"prompt": ', headers={"Content-Type": "application/json"}
    )
    assert malformed.status_code == 400
    assert malformed.json()["error"]["message"].startswith("the body is no request: ")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt', but '"):
        client.completions.create(model="gpt", **GREEDY)
    with pytest.raises(openai.NotFoundError, match="there is nothing here"):
        client.embeddings.create(model="gpt", input="sea")


def test_parallel_requests_each_get_their_own_text(server: Server) -> None:
    asked = [{"prompt": prompt, "max_tokens": 20, "seed": 3} for prompt in ("sea", "night", "in the", "day")]
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = write(asked[number])

    def write(body: dict[str, object]) -> str:
        answer = httpx.post(f"{server.url}/completions", json=body, timeout=60)
        return str(answer.json()["choices"][0]["text"])

    threads = [threading.Thread(target=ask, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(4)] == [write(body) for body in asked]


SPIED = """
from flows.cli import app
from lm.runtime import Generator

run = Generator.run

def spied(self, ids, cache, last=False):
    print("rows", len(ids), flush=True)
    return run(self, ids, cache, last)

Generator.run = spied
app(prog_name="overnight")
"""


def test_so_many_texts_are_written_side_by_side_as_the_command_is_told(root: Path) -> None:
    server = Server(root, "--parallel", "1", program=("-c", SPIED))
    try:
        body = {"prompt": ["sea", "night"], "max_tokens": 4}
        assert httpx.post(f"{server.url}/completions", json=body, timeout=60).status_code == 200
    finally:
        _, output = server.stop()
    assert "rows 1\n" in output
    assert "rows 2\n" not in output


COUNTED = """
import atexit, gc
from flows.cli import app

atexit.register(lambda: print("LEFT", len(gc.get_objects())))
app(prog_name="overnight")
"""


def test_what_requests_leave_is_collected(root: Path) -> None:
    server = Server(root, program=("-c", COUNTED))
    try:
        with httpx.Client() as client:
            for _ in range(60):
                assert client.post(f"{server.url}/completions", json=GREEDY).status_code == 200
    finally:
        _, output = server.stop()
    assert int(output.rpartition("LEFT")[2]) < 10_000


def test_too_many_that_wait_are_an_error_of_the_protocol(root: Path) -> None:
    full = TestClient(make_app(Generator(root / "models/int8"), None, "m", None, parallel=0, most_waiting=0), HERE)
    answer = full.post("/v1/completions", json=GREEDY)
    assert answer.status_code == 429
    assert answer.headers["retry-after"]
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_the_metrics_count_requests_and_tokens(server: Server) -> None:
    def read() -> dict[str, float]:
        text = httpx.get(server.url.replace("/v1", "/metrics")).text
        return {
            key: float(value) for key, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        }

    before = read()
    httpx.post(f"{server.url}/completions", json=GREEDY)
    after = read()
    counted = 'overnight_requests_total{path="/v1/completions",status="200"}'
    assert after[counted] == before.get(counted, 0) + 1
    assert (
        after['overnight_tokens_total{kind="completion"}']
        == before.get('overnight_tokens_total{kind="completion"}', 0) + 8
    )
    assert after["overnight_active_requests"] == 0
    assert after["overnight_completion_seconds_count"] == before["overnight_completion_seconds_count"] + 1


def test_the_metrics_tell_a_minute_from_ten() -> None:
    metrics = Metrics.new()
    for seconds in (60, 600):
        metrics.seconds.observe(seconds)
    [buckets] = metrics.seconds.collect()
    counts = [sample.value for sample in buckets.samples if sample.name.endswith("_bucket")]
    assert sorted({*counts}) == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 3])
def test_the_metrics_count_the_tokens_of_texts_that_were_left(
    root: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    draw, drawn = Sampling.draw, list[int]()

    def note(*arguments: Any) -> int:
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(Sampling, "draw", note)
    metrics = Metrics.new()
    model = Generator(root / "models/int8")
    writer = Writer(model, "m", metrics, 8, 1, threading.Event())
    texts = [Request("sea", 40, Sampling(1.5, 0, seed=seed)) for seed in range(count)]

    def leave() -> None:
        chunks = writer.chunks(Asked(texts, None, True, "prompt"))
        for _ in range(5):
            next(chunks)
        chunks.close()

    anyio.run(anyio.to_thread.run_sync, leave)
    writer._engine.wait(20)
    assert not model.ends.intersection(drawn)
    for kind, expected in (("prompt", 4 * count), ("completion", len(drawn))):
        assert metrics.registry.get_sample_value("overnight_tokens_total", {"kind": kind}) == expected


def test_what_is_sent_in_two_parts_waits_for_no_acknowledgement() -> None:
    with _listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_and_a_missing_model_are_one_line(server: Server, root: Path, tmp_path: Path) -> None:
    port = server.url.split(":")[2].split("/")[0]
    taken = Server(root, "--port", port)
    assert taken.process.wait(timeout=20) == 2
    assert f"--port {port}: cannot listen there (Address already in use)" in taken.said
    lay_out_project(tmp_path)
    without = Server(tmp_path)
    assert without.process.wait(timeout=20) == 2
    assert "model.onnx: no such file. Run `overnight run` first" in without.said
