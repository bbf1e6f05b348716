"""The server's application: its paths, its key, and what it says where it does not answer."""

import contextlib
import hmac
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serve import PARALLEL
from flows.serve.answer import answer
from flows.serve.chat import ChatForm, ChatRequest
from flows.serve.completions import CompletionForm, CompletionRequest
from flows.serve.engine import MOST_WAITING
from flows.serve.metrics import Metrics
from flows.serve.refused import Refused, bad_request, failed, invalid, unknown_model
from flows.serve.request import MOST_TEXTS
from flows.serve.writing import Writer
from lm.chat_template import ChatTemplate
from lm.runtime import Generator

KEY = "OVERNIGHT_API_KEY"
# Of a body, besides its texts; and of a token in it.
_OTHER_BYTES, _BYTES_A_TOKEN = 2**20, 16


class _Bounded:
    """Refuses a body of more than ``most`` bytes while it comes in."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self._most

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the body is longer than {self._most:,} bytes")
            return message

        await self._app(scope, counted, send)


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine and nobody else's."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def make_app(
    generator: Generator,
    template: ChatTemplate | None,
    name: str,
    key: str | None,
    parallel: int = PARALLEL,
    most_waiting: int = MOST_WAITING,
    stopped: threading.Event | None = None,
) -> FastAPI:
    """Returns the application; requests must bring ``key`` where there is one. Once ``stopped``, it writes no more.

    Its ``state.writer`` is to be stopped before the process ends. ``parallel`` and ``most_waiting`` are those of
    :class:`flows.serve.engine.Engine`.
    """
    metrics = Metrics.new()
    writer = Writer(generator, name, metrics, parallel, most_waiting, stopped or threading.Event())

    @contextlib.asynccontextmanager
    async def living(_: FastAPI) -> AsyncIterator[None]:
        # Each request has a thread that waits for its text; others ask for metrics meanwhile.
        threads = anyio.to_thread.current_default_thread_limiter()
        threads.total_tokens += parallel + most_waiting
        yield

    app = FastAPI(title="Overnight", docs_url=None, redoc_url=None, openapi_url=None, lifespan=living)
    app.state.writer = writer
    created = int(time.time())

    # All texts of a request, and each token of theirs as long as JSON makes any: far from it is no request.
    app.add_middleware(_Bounded, most=_OTHER_BYTES + MOST_TEXTS * generator.context * _BYTES_A_TOKEN)

    @app.middleware("http")
    async def checked(request: Request, go_on: Callable[[Request], Any]) -> Response:
        # Headers are bytes, which Starlette reads as Latin-1.
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        status = 500
        try:
            everybodys = request.url.path == "/health"
            if key is None and not everybodys and not is_loopback(request.url.hostname or ""):
                # A page whose name leads here (DNS rebinding) would be one of this server's own to a browser.
                told = f"without a key, this server is asked at 127.0.0.1 or localhost; set {KEY} for other names"
                response: Response = Refused(403, "permission_error", told).response()
            elif key is None or everybodys or hmac.compare_digest(bearer, os.fsencode(key)):
                response = await go_on(request)
            else:
                response = Refused(401, "authentication_error", "the API key is missing or wrong").response()
            status = response.status_code
            return response
        finally:
            # As it is declared: a path with a name in it would be a series for each name that is asked for.
            route = request.scope.get("route")
            known = route.path if route else "other"
            metrics.requests.labels(known, status).inc()

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def misunderstood(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "")
        if "json" not in kind.lower():
            sent = f"is of the Content-Type '{kind}'" if kind else "has no Content-Type"
            told = f"the body {sent}, and is no request; send it as application/json"
            return bad_request(told).response()
        return invalid(error).response()

    @app.exception_handler(HTTPException)
    async def unanswerable(request: Request, error: HTTPException) -> JSONResponse:
        what = f"{request.method} {request.url.path}"
        if error.status_code == 400:
            what = "the body is no request"
        told = "there is nothing here" if error.status_code == 404 else error.detail
        return Refused(error.status_code, "invalid_request_error", f"{what}: {told}").response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return failed(error).response()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def model() -> dict[str, object]:
        return {"id": name, "object": "model", "created": created, "owned_by": "overnight"}

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{wanted:path}")
    def one_model(wanted: str) -> dict[str, object]:
        if wanted != name:
            raise unknown_model(wanted, name)
        return model()

    @app.post("/v1/completions")
    def complete(request: CompletionRequest) -> Response:
        chunks = writer.chunks(request.asked(generator.vocab_size))
        return answer(CompletionForm(request.logprobs), name, request, chunks)

    @app.post("/v1/chat/completions")
    def converse(request: ChatRequest) -> Response:
        chunks = writer.chunks(request.asked(template, generator))
        return answer(ChatForm(request.logprobs), name, request, chunks)

    return app
