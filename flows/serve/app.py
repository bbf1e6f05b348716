"""The server's application: its paths, and what answers each."""

import contextlib
import threading
import time
from collections.abc import AsyncIterator

import anyio.to_thread
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from flows.serve import PARALLEL
from flows.serve.answer import answer
from flows.serve.chat import ChatForm, ChatRequest
from flows.serve.completions import CompletionForm, CompletionRequest
from flows.serve.engine import MOST_WAITING
from flows.serve.guard import guard
from flows.serve.metrics import Metrics
from flows.serve.refused import HANDLERS, unknown_model
from flows.serve.request import MOST_TEXTS
from flows.serve.writing import Writer
from lm.chat_template import ChatTemplate
from lm.runtime import Generator

# Of a body, besides its texts; and of a token in it.
_OTHER_BYTES, _BYTES_A_TOKEN = 2**20, 16


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

    app = FastAPI(
        title="Overnight", docs_url=None, redoc_url=None, openapi_url=None, lifespan=living, exception_handlers=HANDLERS
    )
    app.state.writer = writer
    created = int(time.time())

    # All texts of a request, and each token of theirs as long as JSON makes any: far from it is no request.
    guard(app, key, _OTHER_BYTES + MOST_TEXTS * generator.context * _BYTES_A_TOKEN, metrics)

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
