"""``POST /v1/completions``: texts that the model continues."""

from typing import Annotated

from pydantic import Field, StrictInt, field_validator
from pydantic_core import PydanticCustomError

from flows.serve.answer import Choice, Form, Scores, finish_reason
from flows.serve.refused import bad_request
from flows.serve.request import MOST_LIKELIEST, MOST_TEXTS, Text, WritingRequest, refuse_unknown
from flows.serve.writing import Asked
from lm.text import Done, Request

_Ids = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
_Several = Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)


class CompletionRequest(WritingRequest):
    """The body of a request. A prompt is a text, or its tokens as they are.

    With ``echo``, ``logprobs`` and no tokens to write, it is the prompt that is scored.
    """

    neutral = {"logprobs": (False,), "best_of": (1,), "suffix": ("",)}

    prompt: Text | Annotated[list[Text], _Several] | _Ids | Annotated[list[_Ids], _Several]
    max_tokens: int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LIKELIEST)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _of_one_kind(cls, prompt: object) -> object:
        kinds = {type(one) for one in prompt} if isinstance(prompt, list) else set()
        if isinstance(prompt, str) or (isinstance(prompt, list) and len(kinds) <= 1 and kinds <= {str, int, list}):
            return prompt
        raise PydanticCustomError("prompt", "a text, a list of texts, one of tokens, or one of such lists is needed")

    def asked(self, vocabulary: int) -> Asked:
        """Returns a text for each choice, ``n`` for each prompt; a model has ``vocabulary`` tokens.

        Raises :class:`flows.serve.refused.Refused`.
        """
        prompts = self._prompts()
        for one in (one for prompt in prompts if not isinstance(prompt, str) for one in prompt):
            refuse_unknown("prompt", one, vocabulary)
        if len(prompts) * self.n > MOST_TEXTS:
            raise bad_request(
                f"n: {self.n} texts for each prompt of {len(prompts)} in prompt are more than {MOST_TEXTS}; ask for "
                "fewer at once",
                "n",
            )
        wanted = [prompt for prompt in prompts for _ in range(self.n)]
        texts = [
            Request(prompt, self.max_tokens, sampling, self.stops, echo=self.echo, logprobs=self.logprobs)
            for prompt, sampling in zip(wanted, self.samplings(len(wanted), vocabulary), strict=True)
        ]
        return Asked(texts, self.model, self.seed is not None, "prompt")

    def _prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if ids := tuple(one for one in self.prompt if isinstance(one, int)):
            return [ids]
        return [one if isinstance(one, str) else tuple(one) for one in self.prompt if not isinstance(one, int)]


class CompletionForm(Form):
    """Answers to :class:`CompletionRequest`: an event has the form of a whole answer."""

    prefix = "cmpl"
    whole = event = "text_completion"

    def __init__(self, logprobs: int | None) -> None:
        """``logprobs``: so many of the likeliest tokens are told in the place of each; None: nothing of the kind."""
        self._logprobs = logprobs

    def choice(self, number: int, text: str, done: Done, scores: Scores) -> Choice:
        return self.piece(number, text, done, scores)

    def piece(self, number: int, text: str, done: Done | None, scores: Scores) -> Choice:
        told = None if self._logprobs is None else self._told(scores)
        return {"index": number, "text": text, "logprobs": told, "finish_reason": finish_reason(done)}

    def _told(self, scores: Scores) -> dict[str, object]:
        # By their texts, the token that is there among them; of those that look alike, the likeliest.
        likeliest = [
            None if one.logprob is None else {token.text: token.logprob for token in (*reversed(one.likeliest), one)}
            for one in scores
        ]
        return {
            "tokens": [one.text for one in scores],
            "token_logprobs": [one.logprob for one in scores],
            "top_logprobs": likeliest if self._logprobs else None,
            "text_offset": [one.at for one in scores],
        }
