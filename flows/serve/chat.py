"""``POST /v1/chat/completions``: conversations that the model goes on with, written by its chat template."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from flows.serve.answer import Choice, Form, finish_reason
from flows.serve.refused import bad_request
from flows.serve.request import Body, Text, WritingRequest
from flows.serve.writing import Asked
from lm.chat_template import ChatTemplate, Message, Role, Unrenderable
from lm.text import Done, Request

# Newer models of OpenAI have developers where older ones have the system; templates know the system.
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class TextPart(Body):
    """A part of a message. Images and sound are others, which the model cannot read."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """What was said; parts are lines of it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    def message(self) -> Message:
        """Returns it as templates know it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message(_ROLES[self.role], content)


class ChatRequest(WritingRequest):
    """The body of a request. ``max_tokens`` is the older name; with neither, the answer may fill the context."""

    neutral = {
        **WritingRequest.neutral,
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none",),
        "parallel_tool_calls": (False, True),
        "store": (False,),
        "top_logprobs": (0,),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    # Goes with what a server keeps; this one keeps nothing.
    metadata: dict[str, str] | None = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _alone(cls, tokens: int, request: ValidationInfo) -> int:
        if request.data.get("max_tokens") is not None:
            raise PydanticCustomError("both", "max_tokens is the same by its older name; give one of them")
        return tokens

    def asked(self, template: ChatTemplate | None, context: int) -> Asked:
        """Returns the answers to write after the conversation. Raises :class:`flows.serve.refused.Refused`."""
        if template is None:
            raise bad_request(
                "this model has no chat template, so it continues texts and does not converse: use /v1/completions"
            )
        try:
            prompt = template.encode([message.message() for message in self.messages])
        except Unrenderable as error:
            raise bad_request(str(error), "messages") from None
        most = self.max_completion_tokens or self.max_tokens or context
        texts = [
            Request(tuple(prompt), most, sampling, self.stops, is_answer=True) for sampling in self.samplings(self.n)
        ]
        return Asked(texts, self.model, self.seed is not None, "messages")


class ChatForm(Form):
    """Answers to :class:`ChatRequest`."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    event = "chat.completion.chunk"

    def choice(self, number: int, text: str, done: Done) -> Choice:
        message = {"role": "assistant", "content": text}
        return {"index": number, "message": message, "logprobs": None, "finish_reason": finish_reason(done)}

    def piece(self, number: int, text: str, done: Done | None) -> Choice:
        return self._delta(number, {"content": text} if text else {}, done)

    def opening(self, count: int) -> list[Choice]:
        return [self._delta(number, {"role": "assistant", "content": ""}, None) for number in range(count)]

    def _delta(self, number: int, delta: dict[str, str], done: Done | None) -> Choice:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish_reason(done)}
