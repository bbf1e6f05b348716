"""The thread that writes the texts of all requests side by side: one CPU run writes a token of each."""

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from flows.serve.refused import Refused
from lm.batch import Batch
from lm.runtime import Generator
from lm.text import Done, Text

# So many requests may wait until there is room for them; at a few seconds each, the last one waits a minute.
MOST_WAITING = 16

# Of each text its next piece, and with the last one how it ended.
Chunk = tuple[int, str, Done | None]


class Job:
    """The texts of a request. What comes of them, or the exception that ended them all, is put into ``chunks``."""

    def __init__(self, texts: list[Text], repeatable: bool) -> None:
        self.texts, self.repeatable = texts, repeatable
        self.chunks: SimpleQueue[Chunk | Exception] = SimpleQueue()
        # Those that have not ended. Empty too when somebody has left.
        self.open = set(texts)
        self.batch: Batch | None = None


class Engine:
    """Writes with ``model`` at most ``parallel`` texts at a time; ``most_waiting`` requests wait.

    ``count`` is told each text that has been begun, once it has ended or was left. The thread is there while there is
    something to write.
    """

    def __init__(self, model: Generator, parallel: int, most_waiting: int, count: Callable[[Text], None]) -> None:
        self._model, self._parallel, self._most_waiting, self._count = model, parallel, most_waiting, count
        self._shared = Batch(model, parallel)
        self._change = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: list[Job] = []
        self._left: list[Job] = []
        self._thread: threading.Thread | None = None

    def take(self, texts: list[Text], repeatable: bool) -> Job:
        """Has ``texts`` written as soon as there is room. Raises :class:`Refused` where too many wait.

        ``repeatable``: each product is of these texts alone, so that they are the same in each such call.
        """
        job = Job(texts, repeatable)
        with self._change:
            self._waiting.append(job)
            self._admit()
            if len(self._waiting) > self._most_waiting:
                self._waiting.pop()
                raise Refused(429, "rate_limit_error", f"{self._most_waiting} requests wait already; try again later.")
            if self._thread is None:
                # Python does not wait for it at its end: the server does, for a while.
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
        return job

    def leave(self, job: Job) -> None:
        """Has what is left of ``job`` not be written."""
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job in self._jobs:
                self._left.append(job)

    def wait(self, seconds: float) -> None:
        """Returns when nothing is written, or after ``seconds``."""
        with self._change:
            self._change.wait_for(lambda: self._thread is None, seconds)

    def _admit(self) -> None:
        while self._waiting and sum(len(job.open) for job in self._jobs) < self._parallel:
            self._jobs.append(self._waiting.popleft())

    def _work(self) -> None:
        try:
            self._write()
        except Exception as error:
            # Nobody is left waiting, and the next request begins anew.
            with self._change:
                for job in (*self._jobs, *self._waiting):
                    job.open.clear()
                    job.chunks.put(error)
                self._jobs, self._left, self._thread = [], [], None
                self._waiting.clear()
                self._shared = Batch(self._model, self._parallel)
                self._change.notify_all()

    def _write(self) -> None:
        while True:
            with self._change:
                left, self._left = self._left, []
                for job in left:
                    self._end(job)
                self._jobs = [job for job in self._jobs if job.open]
                self._admit()
                if not self._jobs:
                    self._thread = None
                    self._change.notify_all()
                    return
                jobs = list(self._jobs)
            for job in jobs:
                self._begin(job)
            for batch in {id(job.batch): job.batch for job in jobs}.values():
                assert batch is not None
                self._step(batch, [job for job in jobs if job.batch is batch])

    def _begin(self, job: Job) -> None:
        if job.batch is None:
            job.batch = Batch(self._model, len(job.texts)) if job.repeatable else self._shared
            for text in job.texts:
                job.batch.add(text)

    def _step(self, batch: Batch, jobs: list[Job]) -> None:
        try:
            told = batch.step()
        except Exception as error:
            # What the batch holds is half of something.
            if batch is self._shared:
                self._shared = Batch(self._model, self._parallel)
            for job in jobs:
                self._end(job)
                job.chunks.put(error)
            return
        for text, piece in told:
            job = next(job for job in jobs if text in job.open)
            if text.done:
                job.open.remove(text)
                self._count(text)
            if piece or text.done:
                job.chunks.put((job.texts.index(text), piece, text.done))

    def _end(self, job: Job) -> None:
        for text in job.open:
            if job.batch is not None:
                job.batch.drop(text)
            if text.begun:
                self._count(text)
        job.open.clear()
