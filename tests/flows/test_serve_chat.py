"""A model that converses behind OpenAI's protocol, as the openai client and plain requests meet it."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny
from fastapi.testclient import TestClient
from odd import export_over_bytes, export_to_chat
from serving import HERE, Server, lay_out_project

from flows.serve.app import make_app
from lm.chat_template import ChatTemplate, Message
from lm.runtime import Generator
from lm.sampling import Sampling
from lm.text import Done, Request

SEA = [{"role": "user", "content": "sea"}]
GREEDY: dict[str, Any] = {"messages": SEA, "temperature": 0, "max_tokens": 9}
TALK = [
    {"role": "developer", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "sea"}]},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "land"},
]
TALK_AS_THE_TEMPLATE_KNOWS_IT = [
    Message("system", "Be short."),
    Message("user", "the\nsea"),
    Message("assistant", "Yes."),
    Message("user", "land"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = lay_out_project(tmp_path_factory.mktemp("project"))
    export_to_chat(root / "models/int8")
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    server = Server(root)
    assert ": completions and chat, without a key." in server.said
    yield server
    code, output = server.stop()
    assert (code, "Traceback" in output) == (130, False), output


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(root: Path) -> Generator:
    return Generator(root / "models/int8")


def answer(model: Generator, root: Path, messages: list[Message], count: int, *how: Any) -> str:
    template = ChatTemplate.read(root / "models/int8", model.tokenizer)
    assert template is not None
    return "".join(model.generate(Request(tuple(template.encode(messages)), count, *how)))


def test_it_answers_as_the_model_goes_on_after_its_template(
    client: openai.OpenAI, root: Path, model: Generator
) -> None:
    told = client.chat.completions.create(model=root.name, **GREEDY)
    assert told.object == "chat.completion"
    assert told.id.startswith("chatcmpl-")
    choice = told.choices[0]
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content == answer(model, root, [Message("user", "sea")], 9, Sampling(0))
    assert told.usage is not None
    prompt = len("\1user\nsea\2\n\1assistant\n")
    assert told.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": prompt,
        "completion_tokens": 9,
        "total_tokens": prompt + 9,
    }


def test_roles_parts_and_an_answer_sent_back_are_read(client: openai.OpenAI, root: Path, model: Generator) -> None:
    told = client.chat.completions.create(
        model=root.name, messages=TALK, temperature=1.2, top_p=0.9, seed=4, stop=["e"], max_completion_tokens=20
    )
    sampling = Sampling(1.2, 0, 0.9, seed=4)
    assert told.choices[0].message.content == answer(model, root, TALK_AS_THE_TEMPLATE_KNOWS_IT, 20, sampling, ("e",))
    again = [*TALK, told.choices[0].message, {"role": "user", "content": "so?", "name": None}]
    assert client.chat.completions.create(model=root.name, messages=again, seed=1, max_tokens=2).choices


def test_a_template_that_writes_who_spoke_is_told(model: Generator) -> None:
    naming = tiny.CHATML.replace("message.role +", "message.role + (' ' + message.name if message.name else '') +")
    app = TestClient(make_app(model, ChatTemplate(naming, {}, model.tokenizer, "t"), "m", None), HERE)
    counts = []
    for name in ({}, {"name": "Ann"}):
        told = app.post("/v1/chat/completions", json={"messages": [{**SEA[0], **name}], "max_tokens": 1})
        counts.append(told.json()["usage"]["prompt_tokens"])
    assert counts[1] - counts[0] == len(" Ann")


def test_a_stream_begins_with_the_role_and_ends_with_the_usage_that_was_asked_for(
    client: openai.OpenAI, root: Path
) -> None:
    whole = client.chat.completions.create(model=root.name, seed=0, **GREEDY)
    chunks = list(client.chat.completions.create(model=root.name, stream=True, seed=0, **GREEDY))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert len(deltas) > 4
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]

    how: Any = {"stream": True, "stream_options": {"include_usage": True}}
    *others, last = client.chat.completions.create(model=root.name, **how, **GREEDY)
    assert len(others) == len(chunks)
    assert [chunk.usage for chunk in others] == [None] * len(others)
    assert all("usage" in chunk.model_fields_set for chunk in others)
    assert (last.choices, last.usage) == ([], whole.usage)
    *_, completed = client.completions.create(model=root.name, prompt="sea", max_tokens=3, temperature=0, **how)
    assert completed.usage is not None
    assert completed.usage.completion_tokens == 3


def test_without_a_limit_the_answer_may_fill_the_context(client: openai.OpenAI, root: Path, model: Generator) -> None:
    told = client.chat.completions.create(model=root.name, messages=SEA, temperature=0)
    assert told.usage is not None
    ended = told.choices[0].finish_reason == "stop"
    assert ended or told.usage.total_tokens == model.context == 256
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=root.name, messages=[{"role": "user", "content": "a" * 300}], stream=True)
    assert refused.value.param == "messages"
    assert "the prompt has 319 tokens, and the model reads at most 256" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "parameter", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported here"),
        ({"logprobs": 1}, "logprobs", "Input should be a valid boolean"),
        ({"top_logprobs": 2}, "top_logprobs", "goes with logprobs: true alone"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "Input should be less than or equal to 20"),
        ({"echo": True}, "echo", "not supported here"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "there is no token 5000"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported here"),
        ({"store": True}, "store", "not supported here"),
        ({"n": 33}, "n", "Input should be less than or equal to 32"),
        ({"top_p": 0}, "top_p", "Input should be greater than 0"),
        ({"max_completion_tokens": 3}, "max_completion_tokens", "max_tokens is the same by its older name"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream: true alone"),
        ({"stream": True, "stream_options": {"pace": 1}}, "stream_options.pace", "not supported here"),
        ({"messages": []}, "messages", "List should have at least 1 item"),
        ({"messages": "sea"}, "messages", "Input should be a valid list"),
        ({"messages": None}, "messages", "Field required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Field required"),
        ({"messages": [*SEA, {"role": "tool", "content": "x"}]}, "messages[1].role", "'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "not UTF-8: U+D800 is half"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            *("messages[0].content[0].text", "not UTF-8: U+D800 is half"),
        ),
        ({"messages": [{**SEA[0], "name": "\ud800"}]}, "messages[0].name", "not UTF-8: U+D800 is half"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            *("messages[0].content[0].type", "Input should be 'text'"),
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_its_parameter(
    server: Server, changes: dict[str, object], parameter: str, message: str
) -> None:
    # With escapes, as Python's json writes them: httpx would send UTF-8.
    body = json.dumps({**GREEDY, **changes})
    told = httpx.post(f"{server.url}/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert told.status_code == 400
    error = told.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", parameter)
    assert error["message"].startswith(f"{parameter}: ")
    assert message in error["message"]


def test_nulls_count_as_left_out(server: Server) -> None:
    told = httpx.post(f"{server.url}/chat/completions", json={**GREEDY, "tools": None, "logprobs": None, "top_p": None})
    assert told.status_code == 200


def test_what_changes_nothing_may_be_sent(client: openai.OpenAI, root: Path, model: Generator) -> None:
    neutral: Any = {
        **{"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False, "tools": []},
        **{"response_format": {"type": "text"}, "store": False, "metadata": {"of": "me"}, "user": "me", "n": 1},
        **{"parallel_tool_calls": True, "tool_choice": "auto", "top_logprobs": 0},
        **{"functions": [], "modalities": ["text"], "service_tier": "auto"},
    }
    told = client.chat.completions.create(model=root.name, **GREEDY, **neutral)
    assert told.choices[0].message.content == answer(model, root, [Message("user", "sea")], 9, Sampling(0))


def test_a_conversation_of_more_messages_than_tokens_fit_is_refused_before_it_is_written(
    model: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatTemplate, "encode", None)
    app = TestClient(make_app(model, ChatTemplate(tiny.CHATML, {}, model.tokenizer, "t"), "m", None), HERE)
    messages = [{"role": "user", "content": ""}] * (model.context + 1)
    told = app.post("/v1/chat/completions", json={"messages": messages})
    assert told.status_code == 400
    assert f"{model.context + 1} tokens or more, and the model reads at most" in told.json()["error"]["message"]


def test_what_a_message_has_in_the_place_of_its_content_is_named(server: Server) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    told = httpx.post(f"{server.url}/chat/completions", json={"messages": [*SEA, called]})
    assert told.status_code == 400
    assert told.json()["error"]["message"] == "messages[1].tool_calls: not supported here"


def test_several_answers_are_drawn_by_seeds_of_their_own(client: openai.OpenAI, root: Path) -> None:
    asked: Any = {"model": root.name, "messages": SEA, "n": 3, "seed": 5, "max_tokens": 6}
    whole = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len("\1user\nsea\2\n\1assistant\n")
    streamed, roles = ["", "", ""], list[str | None]()
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] += choice.delta.content or ""
        roles += [choice.delta.role] if choice.delta.role else []
    assert (streamed, roles) == (texts, ["assistant"] * 3)


def test_malformed_bodies_and_another_model_are_errors_of_the_protocol(server: Server, client: openai.OpenAI) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b'{"messages": ', b"[]", b'{"messages": "\xff"}'):
        told = httpx.post(f"{server.url}/chat/completions", content=content, headers=headers)
        assert told.status_code == 400, told.text
        assert told.json()["error"]["message"].startswith("the body is no request: ")
    read = httpx.get(f"{server.url}/chat/completions")
    assert (read.status_code, read.json()["error"]["message"]) == (405, "GET /v1/chat/completions: Method Not Allowed")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt', but '"):
        client.chat.completions.create(model="gpt", **GREEDY)


def test_a_conversation_that_the_template_refuses_and_a_model_without_one_say_so(model: Generator) -> None:
    strict = ChatTemplate("{{ raise_exception('Roles must alternate.') }}", {}, model.tokenizer, "t")
    for template, parameter, message in (
        (strict, "messages", "the model's chat template refuses this conversation: Roles must alternate."),
        (None, None, "this model has no chat template, so it continues texts and does not converse"),
    ):
        app = TestClient(make_app(model, template, "m", None), HERE)
        for stream in (False, True):
            told = app.post("/v1/chat/completions", json={**GREEDY, "stream": stream})
            assert told.status_code == 400
            assert told.json()["error"]["param"] == parameter
            assert message in told.json()["error"]["message"]
        assert app.post("/v1/completions", json={"prompt": "sea", "max_tokens": 2}).status_code == 200


def test_parallel_conversations_and_completions_each_get_their_own(server: Server) -> None:
    asked: list[tuple[str, dict[str, object]]] = [
        ("/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "seed": 3})
        for text in ("sea", "land")
    ] + [("/completions", {"prompt": text, "max_tokens": 12, "seed": 3}) for text in ("sea", "land")]
    answers: dict[int, object] = {}

    def ask(number: int) -> None:
        answers[number] = write(*asked[number])

    def write(path: str, body: dict[str, object]) -> object:
        choice = httpx.post(f"{server.url}{path}", json=body, timeout=60).json()["choices"][0]
        return choice.get("message", choice.get("text"))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(4)] == [write(*one) for one in asked]
    assert answers[0] != answers[1]


def test_the_metrics_count_both_kinds(root: Path, model: Generator) -> None:
    template = ChatTemplate.read(root / "models/int8", model.tokenizer)
    app = TestClient(make_app(model, template, "m", None), HERE)
    app.post("/v1/chat/completions", json=GREEDY)
    app.post("/v1/completions", json={"prompt": "sea", "max_tokens": 2, "temperature": 0})
    app.post("/v1/chat/completions", json={**GREEDY, "tools": [{}]})
    counted = app.get("/metrics").text
    for path, status in (("/v1/chat/completions", 200), ("/v1/completions", 200), ("/v1/chat/completions", 400)):
        assert f'overnight_requests_total{{path="{path}",status="{status}"}} 1.0' in counted
    assert 'overnight_tokens_total{kind="completion"} 11.0' in counted
    assert "overnight_completion_seconds_count 2.0" in counted
    full = TestClient(make_app(model, template, "m", None, parallel=0, most_waiting=0), HERE)
    assert full.post("/v1/chat/completions", json=GREEDY).status_code == 429


def test_the_metrics_count_guesses(root: Path, model: Generator) -> None:
    ended: list[Done] = []

    def write() -> Iterator[str]:
        ended.append((yield from model.generate(Request("abab", 100, Sampling(temperature=0)))))

    assert "".join(write())
    wrong = ended[0].drafted - ended[0].accepted
    assert 0 < wrong < ended[0].accepted
    app = TestClient(make_app(model, ChatTemplate.read(root / "models/int8", model.tokenizer), "m", None), HERE)
    asked = {"prompt": "abab", "max_tokens": 100, "temperature": 0, "seed": 1}
    assert app.post("/v1/completions", json=asked).status_code == 200
    counted = app.get("/metrics").text
    assert f'overnight_drafted_tokens_total{{accepted="true"}} {ended[0].accepted}.0' in counted
    assert f'overnight_drafted_tokens_total{{accepted="false"}} {wrong}.0' in counted


def test_a_malformed_template_is_told_before_anything_is_served(tmp_path: Path) -> None:
    lay_out_project(tmp_path)
    export_over_bytes(tmp_path / "models/int8")
    (tmp_path / "models/int8/chat_template.jinja").write_text("{% for %}")
    server = Server(tmp_path)
    assert server.process.wait(timeout=20) == 2
    assert "chat_template.jinja: not a chat template: line 1: " in server.said
    assert server.said.startswith("error: ")
