"""Texts side by side that come and go."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd import export_over_bytes, make_grouped, make_model

from lm.batch import Batch
from lm.cache import Cache
from lm.drafting import Ids
from lm.runtime import Generator
from lm.sampling import Logits, Sampling
from lm.text import Request, Text

REQUESTS = [
    Request("light", 14, Sampling(seed=3)),
    Request("in the beginning was the night; ", 4, Sampling(temperature=0)),
    Request("a" * 50, 40, Sampling(seed=4, temperature=1.5)),
    Request("", 25, Sampling(top_p=0.9, repetition_penalty=1.2), ("t",)),
    Request("in the beginning was the word; ", 9, Sampling(temperature=0)),
    Request("light", 9, Sampling(seed=5)),
]


class Noted(Generator):
    """Notes of how many texts how many tokens each run reads."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.runs: list[tuple[int, ...]] = []

    def run(self, ids: Ids, cache: Cache, last: bool = False) -> Logits:
        self.runs.append(ids.shape)
        return super().run(ids, cache, last)


@pytest.fixture(scope="module", params=[make_model, make_grouped], ids=["latent", "grouped"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model over bytes, exported."""
    return export_over_bytes(tmp_path_factory.mktemp("int8"), request.param)


@pytest.fixture
def model(folder: Path) -> Noted:
    return Noted(folder)


def write(model: Generator, *requests: Request) -> list[str]:
    return ["".join(model.generate(request)) for request in requests]


class Written:
    """The texts of a batch as they are told."""

    def __init__(self, model: Generator, most: int) -> None:
        self.batch, self._model = Batch(model, most), model
        self.texts: list[Text] = []
        self.told: list[str] = []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.texts.append(self._model.text(request))
            self.told.append("")
            self.batch.add(self.texts[-1])

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for text, piece in self.batch.step():
                self.told[self.texts.index(text)] += piece

    def finish(self) -> list[str]:
        while not all(text.done for text in self.texts):
            self.step()
        return self.told


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("between", [0, 1, 5])
def test_each_text_is_the_one_that_it_is_alone(
    model: Noted, most: int, between: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(model, *REQUESTS)
    # So that the cache grows while texts are in it.
    monkeypatch.setattr("lm.cache._GROWTH", 7)
    written = Written(model, most)
    for request in REQUESTS:
        written.add(request)
        written.step(between)
    model.runs.clear()
    assert written.finish() == expected
    assert max(rows for rows, _ in model.runs) <= most


def test_a_text_that_comes_later_is_read_beside_those_that_are_written(
    model: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.batch.PIECE", 16)
    written = Written(model, 4)
    written.add(REQUESTS[0], Request("land", 12, most_drafted=0))
    written.step(3)
    model.runs.clear()
    written.add(REQUESTS[1])
    written.step(4)
    # The 32 tokens of its prompt that are its own, while each of the two others has its next.
    assert model.runs == [(2, 1), (1, 16), (2, 1), (1, 16), (3, 1), (3, 1)]
    assert len(written.texts[0].tokens) - len(written.texts[0].ids) == 7


def test_no_prompt_is_read_where_that_is_left_to_others(model: Noted) -> None:
    written = Written(model, 2)
    written.add(REQUESTS[0])
    assert written.batch.reads
    assert written.batch.step(read=False) == []
    assert model.runs == []
    written.step()
    assert not written.batch.reads
    written.add(*REQUESTS[1:4])
    model.runs.clear()
    written.batch.step(read=False)
    assert model.runs == [(1, 1)]
    written.step()
    # Both rows are taken.
    assert not written.batch.reads


def test_guesses_are_made_for_a_text_that_is_alone_alone(model: Noted) -> None:
    written = Written(model, 2)
    loop = Request("light light light", 30, Sampling(temperature=0))
    written.add(loop, Request("sea", 5))
    written.step(2)
    while not written.texts[1].done:
        assert model.runs[-1][1] == 1 or model.runs[-1][0] == 1
        assert written.texts[0].drafted == 0
        written.step()
    assert written.finish()[0] == write(model, loop)[0]
    assert written.texts[0].drafted > 0


def test_whoever_is_dropped_leaves_the_others_as_they_are(model: Noted) -> None:
    expected = write(model, *REQUESTS)
    for gone in range(4):
        for steps in (0, 1, 3, 6):
            written = Written(model, 3)
            written.add(*REQUESTS)
            written.step(steps)
            written.batch.drop(written.texts[gone])
            before = written.told[gone]
            rest = [place for place in range(len(REQUESTS)) if place != gone]
            while not all(written.texts[place].done for place in rest):
                written.step()
            assert [written.told[place] for place in rest] == [expected[place] for place in rest]
            assert written.told[gone] == before
            assert expected[gone].startswith(before)


def test_a_text_that_fails_leaves_the_others_as_they_are(model: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(model, REQUESTS[0], REQUESTS[2])
    draw = Sampling.draw

    def fail(sampling: Sampling, *arguments: Any) -> int:
        if sampling.seed == 77:
            raise ArithmeticError
        return draw(sampling, *arguments)

    monkeypatch.setattr(Sampling, "draw", fail)
    written = Written(model, 3)
    bad = Request("dark", 9, Sampling(seed=77))
    written.add(REQUESTS[0], bad, REQUESTS[2])
    while not (written.texts[0].done and written.texts[2].done):
        written.step()
    assert [written.told[0], written.told[2]] == expected
    assert isinstance(written.texts[1].failed, ArithmeticError)
    with pytest.raises(ArithmeticError):
        write(model, bad)


def test_a_beginning_that_another_text_has_is_not_read_again(model: Noted) -> None:
    written = Written(model, 3)
    written.add(REQUESTS[1])
    written.step(2)
    model.runs.clear()
    # While the first is still written, and after it has ended.
    written.add(REQUESTS[4])
    written.step()
    assert model.runs == [(1, 1), (1, len("word; "))]
    written.finish()
    expected = write(model, REQUESTS[1], REQUESTS[4])
    model.runs.clear()
    written.add(REQUESTS[1], REQUESTS[4])
    assert written.finish()[2:] == expected
    # The last token of each alone: its logits are needed.
    assert model.runs[0] == (1, 1)
    assert (1, 1) in model.runs[1:3]
    assert all(tokens < 4 for _, tokens in model.runs)


def test_what_conversations_have_said_stays_while_others_are_answered(model: Noted) -> None:
    written = Written(model, 2)
    said = ["in the first conversation ", "and another one speaks of "]
    for text in said:
        written.add(Request(text, 4, Sampling(temperature=0)))
        written.finish()
    expected = write(model, *(Request(f"{text}light", 4, Sampling(temperature=0)) for text in said))
    for number, text in enumerate(said):
        model.runs.clear()
        written.add(Request(f"{text}light", 4, Sampling(temperature=0)))
        # It goes on with what its own row held, wherever that is moved to.
        assert written.finish()[-1] == expected[number]
        # What was written after it is not what follows now.
        assert model.runs[0] == (1, len("light")), number
    model.runs.clear()
    # The one that was left first makes room.
    written.add(Request("something else", 4), Request(f"{said[1]}light", 4))
    written.finish()
    assert [shape for shape in model.runs if shape[0] == 1][:2] == [(1, len("something else") + 1 - 1), (1, 1)]


def test_a_row_whose_text_was_dropped_is_not_the_next_to_make_room(
    model: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.batch.PIECE", 8)
    written = Written(model, 2)
    first, second = "the first of all; ", "and what came second; "
    written.add(Request(first, 4, Sampling(temperature=0)))
    written.finish()
    written.add(Request(second, 4))
    written.step(2)
    written.batch.drop(written.texts[1])
    written.add(Request("another", 4))
    written.step(2)
    model.runs.clear()
    written.add(Request(second, 4))
    while not all(text.done for text in written.texts[2:]):
        written.step()
    # Two pieces were read before, and the token that all begin with was there.
    assert (1, len(second) - 16) in model.runs
    assert (1, 8) not in model.runs


def test_conversations_that_begin_alike_each_have_a_row(model: Noted) -> None:
    written = Written(model, 3)
    said = [f"all are told this at first; {name}: " for name in ("one", "two")]
    for turn in range(3):
        for number in range(2):
            model.runs.clear()
            written.add(Request(said[number], 1, Sampling(temperature=0)))
            written.finish()
            # What is new alone.
            assert turn == 0 or model.runs == [(1, len("more "))]
            said[number] += "more "


def test_rows_change_places_with_all_that_they_hold(model: Noted) -> None:
    cache = model.new_cache(3)
    ids = np.array([[256, *b"night"], [256, *b"light"], [256, *b"depth"]])
    model.run(ids, cache)
    alone = model.run(np.array([[65]]), cache.part(1, 2))
    cache.lengths[1] -= 1
    cache.swap(1, 2)
    assert cache.lengths.tolist() == [6, 6, 6]
    np.testing.assert_array_equal(model.run(np.array([[65]]), cache.part(2, 3)), alone)
    cache.lengths[:] = [6, 6, 6]
    cache.copy(2, 0, 6)
    np.testing.assert_array_equal(model.run(np.array([[65]]), cache.part(0, 1)), alone)
