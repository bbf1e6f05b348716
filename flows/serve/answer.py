"""Answers in OpenAI's form, whole or as a stream of events."""

import itertools
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import anyio
import anyio.to_thread
from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from flows.serve.engine import Chunk
from flows.serve.refused import Refused, failed
from flows.serve.request import WritingRequest
from flows.serve.writing import Chunks
from lm.logprobs import Scored
from lm.text import Done

# As nginx counts those who left before there was an answer; nobody receives it.
_LEFT = 499
_FINISH = {"end of text": "stop", "stop": "stop", "length": "length", "context": "length"}

Choice = dict[str, object]
Scores = Sequence[Scored]


class Form(ABC):
    """What differs between the answers to requests for completions and for chat."""

    # What an answer's id begins with, and the kind of object that a whole answer and an event of a stream are.
    prefix: ClassVar[str]
    whole: ClassVar[str]
    event: ClassVar[str]

    @abstractmethod
    def choice(self, number: int, text: str, done: Done, scores: Scores) -> Choice:
        """Returns a choice of a whole answer; ``scores`` are those of its tokens, if they were asked for."""

    @abstractmethod
    def piece(self, number: int, text: str, done: Done | None, scores: Scores) -> Choice:
        """Returns a choice of an event."""

    def opening(self, count: int) -> list[Choice]:
        """Returns the choices of events that come before any of ``count`` texts."""
        return []


def answer(form: Form, name: str, request: WritingRequest, chunks: Chunks) -> Response:
    """Returns what the model called ``name`` writes, in the way that ``request`` asks for it.

    It is written when it is sent, which raises :class:`flows.serve.refused.Refused`.
    """
    known = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    def begin() -> Response:
        if not request.stream:
            return JSONResponse({**known, "object": form.whole, **_whole(form, chunks, request.n)})
        # What is wrong with the request shows before its first piece, while a status can still be sent.
        first = next(chunks)
        events = _events(form, {**known, "object": form.event}, request, first, chunks)
        return StreamingResponse(events, media_type="text/event-stream")

    return _Answer(begin, chunks)


class _Answer(Response):
    """Begins when it is sent, and ends when the client has left: the text ends there, and whoever waits has their turn.

    What ``begin`` returns is sent, be it a whole answer or the beginning of a stream.
    """

    def __init__(self, begin: Callable[[], Response], chunks: Chunks) -> None:
        super().__init__()
        self._begin, self._chunks = begin, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await _unless_left(self._begin, receive)
            await response(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._chunks.close)


async def _unless_left(begin: Callable[[], Response], receive: Receive) -> Response:
    """Returns what ``begin``, run in a thread, does, or an answer to nobody when the client leaves before."""
    response, failed = Response(status_code=_LEFT), None

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        try:
            response = await anyio.to_thread.run_sync(begin)
        except Exception as error:
            # The group would raise it as one of several.
            failed = error
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed
    return response


def _whole(form: Form, chunks: Chunks, n: int) -> dict[str, object]:
    texts: dict[int, str] = {}
    scored: dict[int, list[Scored]] = {}
    ended: dict[int, Done] = {}
    for number, piece, done, scores in chunks:
        texts[number] = texts.get(number, "") + piece
        scored.setdefault(number, []).extend(scores)
        if done is not None:
            ended[number] = done
    choices = [form.choice(number, texts[number], ended[number], scored[number]) for number in sorted(texts)]
    return {"choices": choices, "usage": _usage(ended, n)}


def _events(
    form: Form, known: dict[str, object], request: WritingRequest, first: Chunk, others: Chunks
) -> Iterator[str]:
    # A stream that ends with what was counted says in each event that this is still to come.
    counted = {"usage": None} if request.streams_usage else {}
    ended: dict[int, Done] = {}
    for choice in form.opening(request.n):
        yield _event({**known, "choices": [choice], **counted})
    try:
        for number, piece, done, scores in itertools.chain([first], others):
            if done is not None:
                ended[number] = done
            yield _event({**known, "choices": [form.piece(number, piece, done, scores)], **counted})
    except Refused as refused:
        yield _event(refused.content)
        return
    except Exception as error:
        # The status is sent already; without this, a text that broke off would look like one that ended.
        yield _event(failed(error).content)
        raise
    if request.streams_usage:
        yield _event({**known, "choices": [], "usage": _usage(ended, request.n)})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(ended: Mapping[int, Done], n: int) -> dict[str, int]:
    # Each prompt counts once, however many texts go on with it.
    read = sum(done.prompt_tokens for number, done in ended.items() if number % n == 0)
    written = sum(done.new_tokens for done in ended.values())
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def finish_reason(done: Done | None) -> str | None:
    """Returns why a text ended, in OpenAI's words; None while it goes on."""
    return None if done is None else _FINISH[done.ending]
