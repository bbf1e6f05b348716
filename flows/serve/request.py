"""What requests for completions and for chat have in common, in OpenAI's names."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flows.serve.refused import bad_request
from lm.sampling import LEAST_PENALTY, MOST_PENALTY, Sampling

# Of a body that is all wrong each fault would be kept, gigabytes of them: of a list the first is enough, and of an
# object so many.
MOST_KEYS = 100
# So many texts are written for one request, side by side.
MOST_TEXTS = 32
# So many of the likeliest tokens are told in the place of each.
MOST_LIKELIEST = 20


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise PydanticCustomError("not_utf8", f"not UTF-8: {found} is half a character") from None
    return text


# JSON may escape half of a character, which no tokenizer reads and no answer can quote.
Text = Annotated[str, AfterValidator(_utf8)]


class Body(BaseModel):
    """A part of a request. A parameter that is null counts as left out, and one that is not listed is refused by name.

    One that is passed over in silence would change what is written. ``neutral`` lists, by parameters that are not
    supported, the values that change nothing: clients send them, and they count as left out.
    """

    # A number in quotes, or true for 1, is a mistake of whoever sent it.
    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, Sequence[object]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        if len(content) > MOST_KEYS:
            raise PydanticCustomError("too_many", "more keys than there are parameters")
        return {name: value for name, value in content.items() if not cls._changes_nothing(name, value)}

    @classmethod
    def _changes_nothing(cls, name: str, value: object) -> bool:
        # To Python, False is 0 as well.
        return value is None or any(type(value) is type(one) and value == one for one in cls.neutral.get(name, ()))


class StreamOptions(Body):
    """What a stream tells besides its text."""

    neutral = {"include_obfuscation": (False,)}

    include_usage: bool = False


def _token(key: object) -> object:
    """Returns the number that a key of ``logit_bias`` is, in one way to write it: JSON's keys are texts."""
    if isinstance(key, str) and key.removeprefix("-").isdecimal() and key == str(int(key)):
        return int(key)
    return key


def at_most(keys: int) -> BeforeValidator:
    """Returns what refuses an object of more ``keys``."""

    def check(found: object) -> object:
        if isinstance(found, Mapping) and len(found) > keys:
            raise PydanticCustomError("too_many", "more than {keys} keys", {"keys": keys})
        return found

    return BeforeValidator(check)


class WritingRequest(Body):
    """How to write, and how to answer; ``top_k`` and ``repetition_penalty`` are ours."""

    model: Text | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.0, ge=LEAST_PENALTY, le=MOST_PENALTY)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[int, BeforeValidator(_token)], Annotated[float, Field(ge=-100, le=100)]],
        at_most(10_000),
    ] = {}
    stop: Text | Annotated[list[Text], Field(max_length=4, fail_fast=True)] | None = None
    seed: int | None = None
    n: int = Field(default=1, ge=1, le=MOST_TEXTS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    def samplings(self, count: int, vocabulary: int) -> list[Sampling]:
        """Returns how to draw each of ``count`` texts: by a seed of its own; a model has ``vocabulary`` tokens.

        Raises :class:`flows.serve.refused.Refused`.
        """
        for token in self.logit_bias:
            refuse_unknown("logit_bias", token, vocabulary)
        # numpy takes no seeds below 0.
        first = secrets.randbits(31) if self.seed is None else self.seed % 2**64
        sampling = Sampling(
            self.temperature,
            self.top_k,
            self.top_p,
            self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            bias=tuple(self.logit_bias.items()),
        )
        return [replace(sampling, seed=first + number) for number in range(count)]

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, options: StreamOptions, request: ValidationInfo) -> StreamOptions:
        if not request.data.get("stream"):
            raise PydanticCustomError("no_stream", "goes with stream: true alone")
        return options

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end what is written."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, stop))

    @property
    def streams_usage(self) -> bool:
        """Whether a stream ends with what was counted."""
        return self.stream_options is not None and self.stream_options.include_usage


def refuse_unknown(parameter: str, token: int, vocabulary: int) -> None:
    """Raises :class:`flows.serve.refused.Refused` where ``token`` in ``parameter`` is none of the ``vocabulary``."""
    if not 0 <= token < vocabulary:
        message = f"{parameter}: there is no token {token}; the model's are 0 to {vocabulary - 1}"
        raise bad_request(message, parameter)
