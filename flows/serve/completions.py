"""``POST /v1/completions``: texts that the model continues."""

from typing import Annotated

from pydantic import Field

from flows.serve.answer import Choice, Form, finish_reason
from flows.serve.refused import bad_request
from flows.serve.request import Text, WritingRequest
from flows.serve.writing import Asked
from lm.runtime import Done, Request

_MOST_TEXTS = 32


class CompletionRequest(WritingRequest):
    """The body of a request."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=_MOST_TEXTS)]
    max_tokens: int = Field(default=16, ge=1)
    n: int = Field(default=1, ge=1, le=_MOST_TEXTS)

    def asked(self) -> Asked:
        """Returns a text for each choice, ``n`` for each prompt. Raises :class:`flows.serve.refused.Refused`."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(prompts) * self.n > _MOST_TEXTS:
            raise bad_request(
                f"n: {self.n} texts for each prompt of {len(prompts)} in prompt are more than {_MOST_TEXTS}; ask for "
                "fewer at once",
                "n",
            )
        wanted = [prompt for prompt in prompts for _ in range(self.n)]
        texts = [
            Request(prompt, self.max_tokens, sampling, self.stops)
            for prompt, sampling in zip(wanted, self.samplings(len(wanted)), strict=True)
        ]
        return Asked(texts, self.model, self.seed is not None, "prompt")


class CompletionForm(Form):
    """Answers to :class:`CompletionRequest`: an event has the form of a whole answer."""

    prefix = "cmpl"
    whole = event = "text_completion"

    def choice(self, number: int, text: str, done: Done) -> Choice:
        return self.piece(number, text, done)

    def piece(self, number: int, text: str, done: Done | None) -> Choice:
        return {"index": number, "text": text, "logprobs": None, "finish_reason": finish_reason(done)}
