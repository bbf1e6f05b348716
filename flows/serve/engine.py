"""The thread that writes the texts of all requests side by side: one CPU run writes a token of each."""

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from flows.serve.refused import Refused
from lm.batch import Batch
from lm.logprobs import Scored
from lm.runtime import Generator
from lm.text import Done, Text

# So many requests may wait until there is room for them; at a few seconds each, the last one waits a minute.
MOST_WAITING = 16


class Chunk(NamedTuple):
    """The next ``piece`` of the text ``number`` of a request, and with the last one how it ended.

    ``scores``: of the piece's tokens, where they were asked for.
    """

    number: int
    piece: str
    done: Done | None
    scores: tuple[Scored, ...]


class Job:
    """The texts of a request. What comes of them, or the exception that ended them all, is put into ``chunks``."""

    def __init__(self, texts: list[Text], repeatable: bool) -> None:
        self.texts, self.repeatable = texts, repeatable
        self.chunks: SimpleQueue[Chunk | Exception] = SimpleQueue()
        # Those that have not ended. Empty too when somebody has left.
        self.open = set(texts)
        self.batch: Batch | None = None


class Engine:
    """Writes with ``model``; a request begins where fewer than ``parallel`` texts are written, else it waits.

    A batch has at most ``parallel`` texts side by side. ``most_waiting`` requests wait. ``count`` is told each text
    that has been begun, once it has ended or was left. The thread is there while there is something to write.
    """

    def __init__(self, model: Generator, parallel: int, most_waiting: int, count: Callable[[Text], None]) -> None:
        self._model, self._parallel, self._most_waiting, self._count = model, parallel, most_waiting, count
        self._shared: Batch | None = None
        self._change = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: list[Job] = []
        self._left: list[Job] = []
        self._thread: threading.Thread | None = None
        self._rounds = 0

    def take(self, texts: list[Text], repeatable: bool) -> Job:
        """Has ``texts`` written as soon as there is room. Raises :class:`Refused` where too many wait.

        ``repeatable``: each product is of these texts alone, so that they are the same in each such call.
        """
        job = Job(texts, repeatable)
        with self._change:
            if self._thread is None:
                # It ends when it finds nothing to write.
                thread = threading.Thread(target=self._work, name="engine", daemon=True)
                thread.start()
                self._thread = thread
            self._waiting.append(job)
            self._admit()
            if len(self._waiting) > self._most_waiting:
                self._waiting.pop()
                raise Refused(429, "rate_limit_error", f"{self._most_waiting} requests wait already; try again later.")
        return job

    def leave(self, job: Job) -> None:
        """Has what is left of ``job`` not be written."""
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job in self._jobs:
                self._left.append(job)

    def wait(self, seconds: float) -> None:
        """Returns when nothing is written any more, or after ``seconds``."""
        with self._change:
            self._change.wait_for(lambda: self._thread is None, seconds)

    def _admit(self) -> None:
        while self._waiting and sum(len(job.open) for job in self._jobs) < self._parallel:
            self._jobs.append(self._waiting.popleft())

    def _work(self) -> None:
        try:
            while jobs := self._next():
                self._write(jobs)
        except Exception as error:
            # Nobody is left waiting, and the next request begins anew.
            with self._change:
                self._fail([*self._jobs, *self._waiting], error)
                self._jobs, self._left, self._thread = [], [], None
                self._waiting.clear()
                self._change.notify_all()

    def _next(self) -> list[Job]:
        """Returns the requests to go on with; none, and the thread is to end."""
        with self._change:
            left, self._left = self._left, []
            for job in left:
                self._end(job)
            self._jobs = [job for job in self._jobs if job.open]
            self._admit()
            if not self._jobs:
                self._thread = None
                self._change.notify_all()
            return list(self._jobs)

    def _write(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.batch is None:
                self._begin(job)
        batches = list({id(job.batch): job.batch for job in jobs if job.batch is not None}.values())
        # A single piece of a prompt comes between two tokens of a text, however many prompts there are.
        readers = [batch for batch in batches if batch.reads]
        reader = readers[self._rounds % len(readers)] if readers else None
        self._rounds += 1
        for batch in batches:
            if batch is reader or batch is self._shared or not batch.reads:
                self._step(batch, [job for job in jobs if job.batch is batch], batch is reader)
            # What is repeatable is written in the same steps whoever else is there: it waits for its turn to read.

    def _begin(self, job: Job) -> None:
        if job.repeatable:
            job.batch = Batch(self._model, min(len(job.texts), self._parallel))
        else:
            self._shared = job.batch = self._shared or Batch(self._model, self._parallel)
        for text in job.texts:
            job.batch.add(text)

    def _step(self, batch: Batch, jobs: list[Job], read: bool) -> None:
        try:
            told = batch.step(read)
        except Exception as error:
            self._fail(jobs, error)
            return
        for text, piece in told:
            job = next((job for job in jobs if text in job.open), None)
            if job is None:
                # Another text of its request has failed.
                continue
            if text.failed is not None:
                self._end(job)
                job.chunks.put(text.failed)
                continue
            if text.done:
                job.open.remove(text)
                self._count(text)
            if piece or text.done:
                job.chunks.put(Chunk(job.texts.index(text), piece, text.done, text.take_scores()))

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        """Ends ``jobs`` by ``error``; what their batch holds is half of something, and nobody goes on with it."""
        for job in jobs:
            if job.batch is self._shared:
                self._shared = None
            job.batch = None
            self._end(job)
            job.chunks.put(error)

    def _end(self, job: Job) -> None:
        for text in job.open:
            if job.batch is not None:
                job.batch.drop(text)
            if text.begun:
                self._count(text)
        job.open.clear()
