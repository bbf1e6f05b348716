"""The texts that a request asks for, piece by piece as they are written."""

import contextlib
import queue
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass

from anyio.from_thread import check_cancelled

from flows.serve.engine import Chunk, Engine
from flows.serve.metrics import Metrics
from flows.serve.refused import Refused, bad_request, unknown_model
from lm.runtime import Generator as Model
from lm.runtime import PromptTooLong
from lm.text import Request, Text

_SECONDS_BETWEEN_LOOKS = 0.1
# So long one operator of the graph does not take.
_SECONDS_TO_STOP = 10


@dataclass(frozen=True)
class Asked:
    """Texts to write side by side, by the model ``model``, or by whichever there is.

    ``repeatable``: the same texts each time. ``parameter`` is at fault when a text's prompt is too long.
    """

    texts: list[Request]
    model: str | None
    repeatable: bool
    parameter: str


Chunks = Generator[Chunk, None, None]


class Writer:
    """Writes what is asked for with ``model``, which is called ``name``, until it is ``stopped``.

    ``parallel`` and ``most_waiting`` are those of :class:`flows.serve.engine.Engine`.
    """

    def __init__(
        self, model: Model, name: str, metrics: Metrics, parallel: int, most_waiting: int, stopped: threading.Event
    ) -> None:
        self._model, self._name, self._metrics, self._stopped = model, name, metrics, stopped
        # Beside others, or after a beginning that is there already, sums are taken in another order, and a text may
        # turn where two tokens are nearly alike: who gives a seed asks for the very same text.
        self._engine = Engine(model, parallel, most_waiting, self._count)

    def chunks(self, asked: Asked) -> Chunks:
        """Yields what comes of the texts. Raises :class:`Refused`.

        It is run in a thread of anyio's: where the task that waits for it is cancelled, it ends.
        """
        if asked.model not in (None, self._name):
            raise unknown_model(asked.model, self._name)
        started = time.monotonic()
        try:
            texts = [self._model.text(request) for request in asked.texts]
        except PromptTooLong as error:
            raise bad_request(f"{error}.", asked.parameter) from None
        with self._metrics.active.track_inprogress():
            job = self._engine.take(texts, asked.repeatable)
            try:
                missing = len(texts)
                while missing:
                    chunk: Chunk | Exception | None = None
                    with contextlib.suppress(queue.Empty):
                        chunk = job.chunks.get(timeout=_SECONDS_BETWEEN_LOOKS)
                    self._look()
                    if isinstance(chunk, Exception):
                        raise chunk
                    if chunk is not None:
                        missing -= chunk.done is not None
                        yield chunk
            finally:
                self._engine.leave(job)
                self._metrics.seconds.observe(time.monotonic() - started)

    def stop(self) -> None:
        """Ends what is written, also in the middle of a token, and returns when the model is at rest."""
        self._model.stop()
        self._engine.wait(_SECONDS_TO_STOP)

    def _look(self) -> None:
        """Raises where what is asked for is not to be written any more."""
        if self._stopped.is_set():
            raise Refused(503, "server_error", "the server is being stopped; ask again when it is back")
        check_cancelled()

    def _count(self, text: Text) -> None:
        self._metrics.tokens.labels("prompt").inc(len(text.ids))
        self._metrics.tokens.labels("completion").inc(text.new_tokens)
        self._metrics.drafted.labels("true").inc(text.accepted)
        self._metrics.drafted.labels("false").inc(text.drafted - text.accepted)
