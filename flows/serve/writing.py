"""The texts that requests ask for, written one request after another."""

import contextlib
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass

from anyio.from_thread import check_cancelled

from flows.serve.metrics import Metrics
from flows.serve.refused import Refused, bad_request
from flows.serve.turns import Turns
from lm.runtime import Done, Held, PromptTooLong, Request
from lm.runtime import Generator as Model


@dataclass(frozen=True)
class Asked:
    """Texts to write side by side, by the model ``model``, or by whichever there is.

    ``repeatable``: the same texts each time. ``parameter`` is at fault when a text's prompt is too long.
    """

    texts: list[Request]
    model: str | None
    repeatable: bool
    parameter: str


# Of each text its next piece, and with the last one how it ended.
Chunk = tuple[int, str, Done | None]
Chunks = Generator[Chunk, None, None]


class Writer:
    """Writes what is asked for with ``model``, which is called ``name``, until it is ``stopped``."""

    def __init__(self, model: Model, name: str, metrics: Metrics, most_waiting: int, stopped: threading.Event) -> None:
        self._model, self._name, self._metrics, self._stopped = model, name, metrics, stopped
        self._turns = Turns(most_waiting)
        # A text that begins as the last one did, as in a conversation, is not read anew. Sums are then taken in another
        # order, and a text may turn where two tokens are nearly alike: who gives a seed asks for the very same text.
        self._held = Held()

    def chunks(self, asked: Asked) -> Chunks:
        """Yields (number of the text, next piece of it, how it ended or None). Raises :class:`Refused`.

        It is run in a thread of anyio's: where the task that waits for it is cancelled, it ends.
        """
        if asked.model not in (None, self._name):
            message = f"there is no model '{asked.model}', but '{self._name}'"
            raise Refused(404, "invalid_request_error", message, "model")
        started = time.monotonic()
        with self._metrics.active.track_inprogress(), self._turns.take(self._look):
            # One request writes at a time: what the model has had more at its end is of this one, and of all its texts,
            # those that were left too.
            tally = self._model.tally
            prompt, new = tally.prompt, tally.new
            # Between the pieces of a long prompt too.
            self._model.look = self._look
            try:
                with contextlib.closing(self._write(asked.texts, None if asked.repeatable else self._held)) as pieces:
                    for number, piece, done in pieces:
                        self._look()
                        if done is not None:
                            self._metrics.drafted.labels("true").inc(done.accepted)
                            self._metrics.drafted.labels("false").inc(done.drafted - done.accepted)
                        yield number, piece, done
            except PromptTooLong as error:
                raise bad_request(f"{error}.", asked.parameter) from None
            finally:
                self._model.look = lambda: None
                self._metrics.tokens.labels("prompt").inc(tally.prompt - prompt)
                self._metrics.tokens.labels("completion").inc(tally.new - new)
                self._metrics.seconds.observe(time.monotonic() - started)

    def _look(self) -> None:
        """Raises where what is asked for is not to be written any more."""
        if self._stopped.is_set():
            raise Refused(503, "server_error", "the server is being stopped; ask again when it is back")
        check_cancelled()

    def _write(self, texts: list[Request], held: Held | None) -> Chunks:
        if len(texts) > 1:
            yield from self._model.generate_batch(texts)
            return
        with contextlib.closing(self._model.generate(texts[0], held)) as pieces:
            while True:
                try:
                    yield 0, next(pieces), None
                except StopIteration as end:
                    yield 0, "", end.value
                    return
