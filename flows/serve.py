"""``overnight serve``: the project's INT8 model behind OpenAI's completions protocol, on loopback.

One text, or the texts of one request side by side, are written at a time: a CPU that writes two at once writes both at
half the speed. Others wait for their turn, and when too many wait they are told so.
"""

import contextlib
import dataclasses
import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from starlette.types import Receive, Scope, Send

from flows.generate import EXIT_INTERRUPTED, load, place
from lm.runtime import Done, Held, PromptTooLong
from lm.runtime import Generator as Writer
from lm.runtime import Request as Text
from lm.sampling import Sampling
from tasks.errors import UserMistake

KEY = "OVERNIGHT_API_KEY"
# So many requests may wait for their turn; at a few seconds each, the last one waits a minute.
MOST_WAITING = 16
_MOST_TEXTS = 32
_FINISH = {"end of text": "stop", "stop": "stop", "length": "length", "context": "length"}


# Of each choice the pieces of its text, and with the last one how it ended.
Chunks = Generator[tuple[int, str, Done | None], None, None]


class CompletionRequest(BaseModel):
    """The body of ``POST /v1/completions``, in OpenAI's names; ``top_k`` and ``repetition_penalty`` are ours.

    What is not listed here is refused by name: a parameter that is passed over in silence changes what is written.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=_MOST_TEXTS)]
    model: str | None = None
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    n: int = Field(default=1, ge=1, le=_MOST_TEXTS)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = Field(default=None, ge=0)
    stream: bool = False
    user: str | None = None

    def texts(self) -> list[Text]:
        """Returns a text for each choice, ``n`` for each prompt; each draws by a seed of its own."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        first = secrets.randbits(31) if self.seed is None else self.seed
        wanted = [prompt for prompt in prompts for _ in range(self.n)]
        return [
            Text(
                prompt,
                self.max_tokens,
                Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty, first + number),
                tuple(filter(None, stop)),
            )
            for number, prompt in enumerate(wanted)
        ]


class Refused(Exception):
    """A request that is not answered: the HTTP status, and OpenAI's type of the error with the parameter at fault."""

    def __init__(self, status: int, kind: str, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.parameter = status, kind, parameter

    def response(self) -> JSONResponse:
        """The answer as OpenAI gives it."""
        error = {"message": str(self), "type": self.kind, "param": self.parameter, "code": None}
        headers = {"Retry-After": "5"} if self.status == 429 else None
        return JSONResponse({"error": error}, self.status, headers)


class Turns:
    """Lets one request write at a time, and refuses more than ``most`` that wait."""

    def __init__(self, most: int) -> None:
        self._most = most
        # The one whose turn it is among them.
        self.waiting = 0
        self._count, self._turn = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Returns when it is this one's turn. Raises :class:`Refused` at once when too many wait."""
        with self._count:
            if self.waiting > self._most:
                raise Refused(429, "rate_limit_error", f"{self._most} requests wait already; try again in a while.")
            self.waiting += 1
        try:
            with self._turn:
                yield
        finally:
            with self._count:
                self.waiting -= 1


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What ``/metrics`` shows."""

    registry: CollectorRegistry
    requests: Counter
    tokens: Counter
    seconds: Histogram
    active: Gauge

    @classmethod
    def new(cls) -> "Metrics":
        """Returns metrics that have counted nothing."""
        registry = CollectorRegistry()
        return cls(
            registry,
            Counter(
                "overnight_requests",
                "Requests answered, by path and HTTP status.",
                ["path", "status"],
                registry=registry,
            ),
            Counter("overnight_tokens", "Tokens read and written.", ["kind"], registry=registry),
            Histogram("overnight_completion_seconds", "From a request's arrival to its last token.", registry=registry),
            Gauge(
                "overnight_active_requests", "Completions being written or waiting for their turn.", registry=registry
            ),
        )


class Completions:
    """Writes what a request asks for with ``generator``; ``name`` is what the model is called."""

    def __init__(self, generator: Writer, name: str, metrics: Metrics, most_waiting: int) -> None:
        self.name = name
        self._generator, self._metrics = generator, metrics
        self._turns = Turns(most_waiting)
        # A text that begins as the last one did, as in a conversation, is not read anew. Sums are then taken in another
        # order, and a text may turn where two tokens are nearly alike: who gives a seed asks for the very same text.
        self._held = Held()

    def chunks(self, request: CompletionRequest) -> Chunks:
        """Yields (choice, next piece of its text, how it ended or None). Raises :class:`Refused`."""
        if request.model not in (None, self.name):
            raise Refused(
                404, "invalid_request_error", f"there is no model '{request.model}', but '{self.name}'", "model"
            )
        started = time.monotonic()
        with self._metrics.active.track_inprogress(), self._turns.take():
            try:
                for number, piece, done in self._write(
                    request.texts(), None if request.seed is not None else self._held
                ):
                    if done is not None:
                        self._metrics.tokens.labels("prompt").inc(done.prompt_tokens)
                        self._metrics.tokens.labels("completion").inc(done.new_tokens)
                    yield number, piece, done
            except PromptTooLong as error:
                raise Refused(400, "invalid_request_error", f"{error}.", "prompt") from None
            finally:
                self._metrics.seconds.observe(time.monotonic() - started)

    def _write(self, texts: list[Text], held: Held | None) -> Iterator[tuple[int, str, Done | None]]:
        if len(texts) > 1:
            yield from self._generator.generate_batch(texts)
            return
        pieces = self._generator.generate(texts[0], held)
        while True:
            try:
                yield 0, next(pieces), None
            except StopIteration as end:
                yield 0, "", end.value
                return


def make_app(generator: Writer, name: str, key: str | None, most_waiting: int = MOST_WAITING) -> FastAPI:
    """Returns the server's application; requests must bring ``key`` where there is one."""
    app = FastAPI(title="Overnight", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics.new()
    completions = Completions(generator, name, metrics, most_waiting)
    created = int(time.time())

    @app.middleware("http")
    async def checked(request: Request, go_on: Callable[[Request], Any]) -> Response:
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and request.url.path != "/health" and not hmac.compare_digest(bearer.encode(), key.encode()):
            response: Response = Refused(401, "authentication_error", "the API key is missing or wrong").response()
        else:
            response = await go_on(request)
        known = request.url.path if request.scope.get("route") else "other"
        metrics.requests.labels(known, response.status_code).inc()
        return response

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # "body" first, then the parameter; after it, the place in a list or the type that was tried.
        parameter = str(first["loc"][1]) if len(first["loc"]) > 1 and isinstance(first["loc"][1], str) else None
        told = "not supported here" if first["type"] == "extra_forbidden" else first["msg"]
        message = f"{parameter}: {told}" if parameter else f"the body is no request: {told}"
        return Refused(400, "invalid_request_error", message, parameter).response()

    @app.exception_handler(404)
    async def nowhere(request: Request, _: Exception) -> JSONResponse:
        return Refused(
            404, "invalid_request_error", f"{request.method} {request.url.path}: there is nothing here"
        ).response()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        model = {"id": name, "object": "model", "created": created, "owned_by": "overnight"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    def complete(request: CompletionRequest) -> Response:
        known = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        chunks = completions.chunks(request)
        if request.stream:
            # What is wrong with the request shows before its first piece, while a status can still be sent.
            first = next(chunks)
            return _Stream(_events(known, first, chunks))
        return JSONResponse({**known, **_whole(chunks)})

    return app


class _Stream(StreamingResponse):
    """Closes its events when the client has left: the text ends there, and whoever waits has their turn."""

    def __init__(self, events: Generator[str, None, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._events.close)


def _whole(chunks: Chunks) -> dict[str, object]:
    texts: dict[int, str] = {}
    ended: dict[int, Done] = {}
    for number, piece, done in chunks:
        texts[number] = texts.get(number, "") + piece
        if done is not None:
            ended[number] = done
    read = sum(done.prompt_tokens for done in ended.values())
    written = sum(done.new_tokens for done in ended.values())
    return {
        "choices": [_choice(number, texts[number], ended[number]) for number in sorted(texts)],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def _events(
    known: dict[str, object], first: tuple[int, str, Done | None], others: Chunks
) -> Generator[str, None, None]:
    with contextlib.closing(others):
        yield _event(known, *first)
        for chunk in others:
            yield _event(known, *chunk)
        yield "data: [DONE]\n\n"


def _event(known: dict[str, object], number: int, piece: str, done: Done | None) -> str:
    return f"data: {json.dumps({**known, 'choices': [_choice(number, piece, done)]})}\n\n"


def _choice(number: int, text: str, done: Done | None) -> dict[str, object]:
    reason = None if done is None else _FINISH[done.ending]
    return {"index": number, "text": text, "logprobs": None, "finish_reason": reason}


def serve(root: Path, host: str, port: int, out: Console) -> int:
    """Serves the INT8 model of the project in ``root`` until Ctrl-C; returns the exit code, 130.

    Raises :class:`UserMistake` for an address that is not this machine's own without a key in the environment, or one
    that is taken, and as :func:`flows.generate.load` does.
    """
    key = os.environ.get(KEY) or None
    if key is None and not _is_loopback(host):
        raise UserMistake(
            f"--host {host}: others can reach that, so set {KEY} to a secret that they must send as 'Authorization: "
            "Bearer ...', or serve on 127.0.0.1."
        )
    folder = place(root, lambda line: out.print(line, highlight=False, soft_wrap=True))
    generator = load(folder)
    with _listen(host, port) as listening:
        asked = f"with the key in {KEY}" if key else "without a key"
        address = f"http://{host}:{listening.getsockname()[1]}/v1"
        out.print(f"Serving {folder} at {address}, {asked}. Ctrl-C stops it.", highlight=False, soft_wrap=True)
        config = uvicorn.Config(make_app(generator, root.name, key), log_level="warning", access_log=False)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    out.print("Stopped.")
    return EXIT_INTERRUPTED


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family)
    except OSError as error:
        # Python adds the address to what the system says.
        why = str(error.strerror).split(" (")[0]
        raise UserMistake(
            f"--host {host} --port {port}: cannot listen there ({why}). Choose another --port (0: any free)."
        ) from None
    with found:
        yield found
