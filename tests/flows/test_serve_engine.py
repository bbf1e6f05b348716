"""The thread that writes the texts of all requests, without a server around it."""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from odd import export_over_bytes

from flows.serve.engine import Engine, Job
from flows.serve.refused import Refused
from lm.batch import Batch
from lm.cache import Cache
from lm.drafting import Ids
from lm.runtime import Generator
from lm.sampling import Logits, Sampling
from lm.text import Request, Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_over_bytes(tmp_path_factory.mktemp("int8"))


def test_whoever_comes_first_is_written_first_and_too_many_that_wait_are_told_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let, ended = threading.Event(), list[Text]()
    model = Generator(folder)
    run = model.run
    monkeypatch.setattr(model, "run", lambda *ids, **how: let.wait(20) and run(*ids, **how))
    engine = Engine(model, 2, 3, ended.append)
    texts = [model.text(Request("sea", 1 + number % 2)) for number in range(5)]
    jobs = [engine.take([text], repeatable=False) for text in texts]
    with pytest.raises(Refused, match="3 requests wait already"):
        engine.take([model.text(Request("sea", 1))], repeatable=False)
    let.set()
    engine.wait(20)
    assert [job.chunks.qsize() > 0 and not job.open for job in jobs] == [True] * 5
    # Two side by side: of the first two the one that is longer ends later.
    assert [texts.index(text) for text in ended] == [0, 1, 2, 3, 4]
    # There is room again.
    last = engine.take([model.text(Request("sea", 1))], repeatable=False)
    engine.wait(20)
    assert not last.open


class Noted(Generator):
    """Notes how many texts each run has, and of how many tokens; it runs when ``let``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.runs: list[tuple[int, ...]] = []
        self.let = threading.Event()

    def run(self, ids: Ids, cache: Cache, last: bool = False) -> Logits:
        assert self.let.wait(20)
        self.runs.append(ids.shape)
        return super().run(ids, cache, last)


@contextlib.contextmanager
def held(model: Noted) -> Iterator[None]:
    model.let.clear()
    yield
    model.let.set()


def text_of(job: Job) -> str:
    """Returns what comes of a text of ``job``, waiting for its end."""
    text = ""
    while True:
        found = job.chunks.get(timeout=20)
        assert isinstance(found, tuple), found
        text += found[1]
        if found[2]:
            return text


def test_texts_with_a_seed_have_runs_of_their_own(folder: Path) -> None:
    model = Noted(folder)
    engine = Engine(model, 4, 3, lambda text: None)
    request = Request("sea", 8, Sampling(temperature=0))
    expected = "".join(Generator(folder).generate(request))
    for repeatable in (False, True):
        model.runs.clear()
        with held(model):
            jobs = [engine.take([model.text(request)], repeatable) for _ in range(2)]
        assert [text_of(job) for job in jobs] == [expected] * 2
        engine.wait(20)
        assert (max(rows for rows, _ in model.runs) == 1) == repeatable
    # And no more of them side by side than others have.
    texts = [model.text(request) for _ in range(9)]
    model.runs.clear()
    engine.take(texts, repeatable=True)
    engine.wait(20)
    assert max(rows for rows, _ in model.runs) == 4
    assert all(text.done for text in texts)


def test_texts_with_a_seed_are_written_in_the_same_steps_whoever_else_asks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.batch.PIECE", 4)
    steps: dict[Batch, list[tuple[bool, int]]] = {}

    class Watched(Batch):
        def step(self, read: bool = True) -> list[tuple[Text, str]]:
            reads, told = self.reads and read, super().step(read)
            steps.setdefault(self, []).append((reads, len(told)))
            return told

    monkeypatch.setattr("flows.serve.engine.Batch", Watched)
    model, written = Noted(folder), []
    for others in (0, 5):
        steps.clear()
        engine = Engine(model, 8, 8, lambda text: None)
        with held(model):
            # The first has many tokens to write, beside which the second is read.
            texts = [model.text(Request("ab", 30)), model.text(Request("q" + "a" * 30, 9))]
            job = engine.take(texts, repeatable=True)
            for number in range(others):
                engine.take([model.text(Request(f"{number}" + "z" * 40, 5))], repeatable=number % 2 == 0)
        engine.wait(20)
        assert not job.open
        assert job.batch is not None
        written.append(steps[job.batch])
    assert written[0] == written[1]


def test_a_request_waits_until_there_is_room_for_a_text_of_it(folder: Path) -> None:
    model = Noted(folder)
    engine = Engine(model, 3, 3, lambda text: None)
    texts = [model.text(Request("sea", 20, Sampling(temperature=0))) for _ in range(4)]
    with held(model):
        engine.take(texts[:3], repeatable=True)
        engine.take(texts[3:], repeatable=True)
    engine.wait(20)
    assert all(text.done for text in texts)
    # The last one's prompt is read when one of the others has ended.
    reads = [place for place, (_, tokens) in enumerate(model.runs) if tokens > 2]
    assert reads[-1] > 15


def test_a_piece_of_one_prompt_alone_comes_between_two_tokens_of_a_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.batch.PIECE", 4)
    model = Noted(folder)
    engine = Engine(model, 8, 3, lambda text: None)
    with held(model):
        text = model.text(Request("sea", 50, Sampling(temperature=0), most_drafted=0))
        jobs = [engine.take([text], repeatable=False)]
        jobs += [engine.take([model.text(Request("a" * 30, 1))], repeatable=True) for _ in range(4)]
    for job in jobs:
        text_of(job)
    pieces = [tokens > 1 for _, tokens in model.runs]
    # Its own prompt, and four of 31 tokens.
    assert sum(pieces) == 1 + 4 * 8
    assert not any(one and other for one, other in itertools.pairwise(pieces[1:]))


def test_what_a_batch_held_when_it_failed_is_not_used_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = Generator(folder), list[Text]()
    engine = Engine(model, 2, 3, counted.append)
    request = Request("sea", 8, Sampling(temperature=0))
    run = model.run

    def half(ids: Ids, cache: Cache, last: bool = False) -> Logits:
        run(ids, cache, last)
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(model, "run", half)
        failed = engine.take([model.text(request)], repeatable=False)
        assert isinstance(failed.chunks.get(timeout=20), MemoryError)
        engine.wait(20)
    assert [text.new_tokens for text in counted] == [0]
    job = engine.take([model.text(request)], repeatable=False)
    assert text_of(job) == "".join(model.generate(request))


@pytest.mark.parametrize("place", ["take", "read"])
def test_a_text_that_fails_ends_its_request_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    model, counted = Noted(folder), list[Text]()
    engine = Engine(model, 4, 3, counted.append)
    sound = Request("sea", 12, Sampling(temperature=0), most_drafted=0)
    # The last one scores its prompt.
    odd = [Request("light", 30), Request("land", 30, echo=True, logprobs=0)]
    expected = "".join(Generator(folder).generate(sound))
    texts = [model.text(request) for request in odd]
    whole = getattr(Text, place)

    def break_off(text: Text, *arguments: Any) -> Any:
        if text is texts[-1] and (place == "read" or text.new_tokens == 5):
            raise ArithmeticError
        return whole(text, *arguments)

    monkeypatch.setattr(Text, place, break_off)
    with held(model):
        other = engine.take([model.text(sound)], repeatable=False)
        failed = engine.take(texts, repeatable=False)
    assert text_of(other) == expected
    engine.wait(20)
    assert not failed.open
    found = [failed.chunks.get() for _ in range(failed.chunks.qsize())]
    assert isinstance(found[-1], ArithmeticError)
    assert sum(isinstance(one, Exception) for one in found) == 1
    assert {*counted} >= {*texts}
    # What the rows hold is whole.
    assert [text_of(engine.take([model.text(one)], repeatable=False)) for one in (sound, odd[0])] == [
        expected, "".join(Generator(folder).generate(odd[0]))
    ]  # fmt: skip


def test_a_fault_of_the_thread_that_writes_is_told_to_all_and_the_next_request_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Generator(folder)
    engine = Engine(model, 1, 3, lambda text: None)
    with monkeypatch.context() as broken:
        broken.setattr(Engine, "_begin", lambda *_: 1 / 0)
        jobs = [engine.take([model.text(Request("sea", 1))], repeatable=False) for _ in range(2)]
        assert [type(job.chunks.get(timeout=20)) for job in jobs] == [ZeroDivisionError] * 2
        engine.wait(20)
    last = engine.take([model.text(Request("sea", 1))], repeatable=False)
    assert last.chunks.get(timeout=20)[2].new_tokens == 1
