"""Guesses at the next tokens, and text with them and without."""

import numpy as np
import pytest
from odd import export_over_bytes, make_grouped, make_model

from lm.batch import Batch
from lm.drafting import MOST, Drafter, what_followed
from lm.runtime import Generator
from lm.sampling import Sampling
from lm.text import Done, Request

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize(
    ("text", "most", "followed"),
    [
        ("the cat, the", 4, " cat"),
        # What repeats itself goes on.
        ("abcabc", 8, "abcabcab"),
        ("aaaa", 9, "aaaaaaaaa"),
        # The last of several places, but rather one that agrees with more.
        ("xay xaz xa", 1, "z"),
        ("bxay xaz bxa", 1, "y"),
        # Beyond six tokens no place is better than another.
        ("1234567a 234567b 1234567", 1, "b"),
        ("ab cb", 3, ""),
        ("abc", 3, ""),
        ("aa", 3, ""),
        ("a", 3, ""),
        ("", 3, ""),
        ("abab", 0, ""),
        ("abab", -1, ""),
    ],
)
def test_what_followed_the_same_tokens_before_is_guessed(text: str, most: int, followed: str) -> None:
    found = what_followed(np.frombuffer(text.encode(), np.uint8).astype(np.int64), most)
    assert bytes(found.tolist()).decode() == followed


def test_there_are_as_many_guesses_as_lately_came_true() -> None:
    drafter, text = Drafter(), np.array([*range(20), 0, 1])
    sizes = []
    for accepted in (3, 6, 7, 6, 0, 0, 0, 1):
        drafted = len(drafter.draft(text, 99))
        sizes.append(drafted)
        drafter.learn(drafted, accepted)
    assert sizes == [3, 6, MOST, MOST, 3, 1, 1, 1]
    assert (drafter.drafted, drafter.accepted) == (29, 23)
    # One that the end of the text cut short says little.
    drafter.learn(1, 1)
    # Where nothing is guessed there is nothing to learn.
    drafter.learn(0, 0)
    assert len(drafter.draft(text, 99)) == 2
    assert len(drafter.draft(text, 1)) == 1
    assert Drafter(0).draft(text, 99) == []


@pytest.fixture(scope="module", params=[make_model, make_grouped], ids=["latent", "grouped"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """An untrained model over bytes, exported."""
    return Generator(export_over_bytes(tmp_path_factory.mktemp("int8"), request.param))


def write(generator: Generator, request: Request, held: Batch | None = None) -> tuple[str, Done]:
    pieces, text = generator.generate(request, held), ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            return text, end.value


# Each token of the first is seen before; the second is drawn from few, so that guesses are right at times.
REQUESTS = [("light light light", GREEDY), ("sea of light, sea of ", Sampling(0.3, top_k=2, seed=3))]


@pytest.mark.parametrize(("prompt", "sampling"), REQUESTS, ids=["greedy", "drawn"])
def test_the_text_is_the_same_with_guesses_and_without(
    generator: Generator, prompt: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, alone = write(generator, Request(prompt, 40, sampling, most_drafted=0))
    assert (alone.drafted, alone.accepted) == (0, 0)
    runs: list[int] = []
    run = generator.run
    monkeypatch.setattr(generator, "run", lambda ids, *more, **named: runs.append(ids.size) or run(ids, *more, **named))
    held = Batch(generator, 1)
    text, done = write(generator, Request(prompt, 40, sampling), held)
    assert text == plain
    assert (done.ending, done.new_tokens) == (alone.ending, alone.new_tokens)
    assert 0 < done.accepted < done.drafted
    # Each run writes one token and those of its guesses that came true.
    assert len(runs) == done.new_tokens - done.accepted
    assert sum(runs) == done.prompt_tokens + done.new_tokens - 1 - done.accepted + done.drafted
    # What the cache holds is the text, without the guesses that were wrong.
    ids = held._rows[0].ids
    assert held._cache.lengths.tolist() == [len(ids)] == [done.prompt_tokens + done.new_tokens - 1]
    longer = Request(tuple(ids), 9, GREEDY)
    assert write(generator, longer, held)[0] == write(generator, longer)[0]


@pytest.mark.parametrize("length", range(1, 12))
def test_guesses_go_no_further_than_the_text(generator: Generator, length: int) -> None:
    prompt = "light light light"
    text, done = write(generator, Request(prompt, length, GREEDY))
    assert (done.ending, done.new_tokens) == ("length", length)
    assert text == write(generator, Request(prompt, length, GREEDY, most_drafted=0))[0]


def test_guesses_go_no_further_than_the_models_positions(generator: Generator) -> None:
    prompt = "ab" * 26
    text, done = write(generator, Request(prompt, 99, GREEDY))
    assert (done.ending, done.prompt_tokens + done.new_tokens) == ("context", generator.context)
    assert text == write(generator, Request(prompt, 99, GREEDY, most_drafted=0))[0]


def test_a_text_that_is_stopped_among_guesses_ends_there_and_can_be_gone_on_with(generator: Generator) -> None:
    prompt, held = "light light light", Batch(generator, 1)
    whole, _ = write(generator, Request(prompt, 30, GREEDY, most_drafted=0))
    pieces = generator.generate(Request(prompt, 30, GREEDY), held)
    begun = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(begun)
    assert write(generator, Request(prompt, 30, GREEDY), held)[0] == whole
    stop = whole[-4:]
    assert write(generator, Request(prompt, 30, GREEDY, (stop,)), held)[0] == whole[: whole.index(stop)]
