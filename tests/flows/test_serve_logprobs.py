"""Probabilities, penalties and biases through OpenAI's protocol."""

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from odd import export_to_chat
from serving import in_this_process

from flows.serve.app import make_app
from lm.chat_template import ChatTemplate
from lm.runtime import Generator

SEA: Any = [{"role": "user", "content": "sea"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(export_to_chat(tmp_path_factory.mktemp("int8")))


@pytest.fixture(scope="module")
def client(model: Generator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = export_to_chat(tmp_path_factory.mktemp("template"))
    template = ChatTemplate.read(folder, model.tokenizer)
    with in_this_process(make_app(model, template, "m", None)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def letters_alone(model: Generator) -> dict[str, int]:
    """A bias that leaves nothing but letters to write."""
    return {str(model.tokenizer.token_to_id(letter)): 100 for letter in "abcdefgh"}


def test_tokens_of_a_completion_come_with_their_probabilities(client: openai.OpenAI, model: Generator) -> None:
    asked: Any = {"model": "m", "prompt": "sea", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    asked["logit_bias"] = letters_alone(model)
    choice = client.completions.create(**asked).choices[0]
    told = choice.logprobs
    assert told is not None
    assert told.tokens is not None
    assert len(told.tokens) == 6
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == [0, 1, 2, 3, 4, 5]
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    for token, share, likeliest in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        # The model's own: the bias made it write what it finds less likely.
        assert likeliest[token] == share <= max(likeliest.values()) < 0
        assert 2 <= len(likeliest) <= 3
    pieces = [event.choices[0] for event in client.completions.create(**asked, stream=True)]
    streamed = [token for piece in pieces if piece.logprobs for token in piece.logprobs.tokens or []]
    assert streamed == told.tokens
    offsets = [at for piece in pieces if piece.logprobs for at in piece.logprobs.text_offset or []]
    assert offsets == told.text_offset
    none = client.completions.create(**{**asked, "logprobs": 0}).choices[0].logprobs
    assert none is not None
    assert (none.tokens, none.top_logprobs) == (told.tokens, None)


def test_a_prompt_is_scored_where_nothing_is_to_be_written(client: openai.OpenAI, model: Generator) -> None:
    """As evaluation harnesses ask how likely a text is: its tokens, echoed, and a token more that they leave out."""
    prompts = [model.tokenizer.encode(text).ids for text in ("the sea", "land")]
    for more in (0, 1):
        answer = client.completions.create(
            model="m", prompt=prompts, max_tokens=more, temperature=0, logprobs=1, echo=True, seed=1
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2 * more
        for choice, prompt, text in zip(answer.choices, prompts, ("the sea", "land"), strict=True):
            assert choice.text.startswith(text)
            told = choice.logprobs
            assert told is not None
            assert told.token_logprobs is not None
            assert told.top_logprobs is not None
            assert len(told.token_logprobs) == len(prompt) + more
            assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
            assert all(share < 0 for share in told.token_logprobs[1:])
            best = [max(likeliest.values()) for likeliest in told.top_logprobs[1:]]
            assert all(share <= one for share, one in zip(told.token_logprobs[1:], best, strict=True))
            if more:
                assert told.token_logprobs[-1] == best[-1]
    # It fills the context, and nothing is to come after it.
    full = client.completions.create(model="m", prompt=[5] * model.context, max_tokens=0, logprobs=0, echo=True)
    assert full.usage is not None
    assert full.usage.prompt_tokens == model.context
    echoed = client.completions.create(model="m", prompt="sea", max_tokens=0, echo=True).choices[0]
    assert (echoed.text, echoed.logprobs, echoed.finish_reason) == ("sea", None, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_an_answer_come_with_theirs(client: openai.OpenAI, model: Generator, stream: bool) -> None:
    asked: Any = {"model": "m", "messages": SEA, "max_tokens": 6, "temperature": 0, "logprobs": True, "stream": stream}
    asked["logit_bias"] = letters_alone(model)
    found = client.chat.completions.create(**asked, top_logprobs=3)
    if stream:
        choices = [event.choices[0] for event in found]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        choices = [found.choices[0]]
        text = choices[0].message.content
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content or []]
    assert "".join(token.token for token in tokens) == text
    assert len(tokens) == 6
    for token in tokens:
        assert token.bytes == [*token.token.encode()]
        shares = [other.logprob for other in token.top_logprobs]
        assert len(shares) == 3
        assert shares == sorted(shares, reverse=True)
        assert sum(map(math.exp, shares)) < 1
        for other in token.top_logprobs:
            # What is half a character has no bytes.
            assert (other.bytes is None) == ("\ufffd" in other.token)
    plain = client.chat.completions.create(model="m", messages=SEA, max_tokens=2)
    assert plain.choices[0].logprobs is None


def test_penalties_keep_a_text_from_repeating_itself(client: openai.OpenAI, model: Generator) -> None:
    def write(**how: Any) -> str:
        bias = letters_alone(model)
        chat = client.chat.completions.create(
            model="m", messages=SEA, max_tokens=40, temperature=0, logit_bias=bias, **how
        )
        text = client.completions.create(model="m", prompt="sea", max_tokens=40, temperature=0, logit_bias=bias, **how)
        return (chat.choices[0].message.content or "") + text.choices[0].text

    def repeated(text: str) -> int:
        return max(text.count(letter) for letter in "abcdefgh")

    plain = write()
    assert write(extra_body={"repetition_penalty": 50.0}) != plain
    assert write(presence_penalty=0.0, frequency_penalty=0) == plain
    assert repeated(write(frequency_penalty=2.0)) < repeated(plain)
    assert write(presence_penalty=2.0) != plain
    assert write(presence_penalty=2.0) != write(frequency_penalty=2.0)
