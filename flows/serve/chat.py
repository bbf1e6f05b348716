"""``POST /v1/chat/completions``: conversations that the model goes on with, written by its chat template."""

from typing import Annotated, Literal

from pydantic import Field, StrictBool, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from flows.serve.answer import Choice, Form, Scores, finish_reason
from flows.serve.refused import bad_request
from flows.serve.request import MOST_KEYS, MOST_LIKELIEST, Body, Text, WritingRequest, at_most
from flows.serve.writing import Asked
from lm.chat_template import ChatTemplate, Message, Role, Unrenderable
from lm.logprobs import Token
from lm.runtime import Generator, PromptTooLong
from lm.text import Done, Request
from lm.tokenizer import HALF

# Newer models of OpenAI have developers where older ones have the system; templates know the system.
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class TextPart(Body):
    """A part of a message. Images and sound are others, which the model cannot read."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """What was said; parts are lines of it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: Text | None = None

    def message(self) -> Message:
        """Returns it as templates know it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message(_ROLES[self.role], content, self.name)


class ChatRequest(WritingRequest):
    """The body of a request. ``max_tokens`` is the older name; with neither, the answer may fill the context."""

    neutral = {
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "parallel_tool_calls": (False, True),
        "store": (False,),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    # Goes with what a server keeps; this one keeps nothing.
    metadata: Annotated[dict[str, str], at_most(MOST_KEYS)] | None = None
    logprobs: StrictBool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_LIKELIEST)

    @field_validator("top_logprobs")
    @classmethod
    def _of_scored_tokens(cls, count: int, request: ValidationInfo) -> int:
        if count and not request.data.get("logprobs"):
            raise PydanticCustomError("not_scored", "goes with logprobs: true alone")
        return count

    @field_validator("max_completion_tokens")
    @classmethod
    def _alone(cls, tokens: int, request: ValidationInfo) -> int:
        if request.data.get("max_tokens") is not None:
            raise PydanticCustomError("both", "max_tokens is the same by its older name; give one of them")
        return tokens

    def asked(self, template: ChatTemplate | None, model: Generator) -> Asked:
        """Returns the answers to write after the conversation. Raises :class:`flows.serve.refused.Refused`."""
        if template is None:
            raise bad_request(
                "this model has no chat template, so it continues texts and does not converse: use /v1/completions"
            )
        messages = [message.message() for message in self.messages]
        try:
            if len(messages) > model.context:
                # Each is a token at least, whatever is in it, and a template takes its time for each.
                raise PromptTooLong(len(messages), model.context, more=True)
            model.check_characters(sum(len(message.content) + len(message.name or "") for message in messages))
            prompt = template.encode(messages)
        except PromptTooLong as error:
            raise bad_request(f"{error}.", "messages") from None
        except Unrenderable as error:
            raise bad_request(str(error), "messages") from None
        most = self.max_completion_tokens or self.max_tokens or model.context
        logprobs = self.top_logprobs if self.logprobs else None
        texts = [
            Request(tuple(prompt), most, sampling, self.stops, is_answer=True, logprobs=logprobs)
            for sampling in self.samplings(self.n, model.vocab_size)
        ]
        return Asked(texts, self.model, self.seed is not None, "messages")


class ChatForm(Form):
    """Answers to :class:`ChatRequest`."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    event = "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        """``logprobs``: tokens are told with theirs."""
        self._logprobs = logprobs

    def choice(self, number: int, text: str, done: Done, scores: Scores) -> Choice:
        return self._choice(number, {"message": {"role": "assistant", "content": text}}, done, scores)

    def piece(self, number: int, text: str, done: Done | None, scores: Scores) -> Choice:
        return self._choice(number, {"delta": {"content": text} if text else {}}, done, scores)

    def opening(self, count: int) -> list[Choice]:
        delta = {"role": "assistant", "content": ""}
        return [self._choice(number, {"delta": delta}, None, ()) for number in range(count)]

    def _choice(self, number: int, said: dict[str, dict[str, str]], done: Done | None, scores: Scores) -> Choice:
        tokens = [{**_token(one), "top_logprobs": [_token(other) for other in one.likeliest]} for one in scores]
        told = {"content": tokens, "refusal": None} if self._logprobs else None
        return {"index": number, **said, "logprobs": told, "finish_reason": finish_reason(done)}


def _token(one: Token) -> dict[str, object]:
    # What is a part of a character has no text of its own, and its bytes are not known here.
    read = None if HALF in one.text else list(one.text.encode())
    return {"token": one.text, "logprob": one.logprob, "bytes": read}
