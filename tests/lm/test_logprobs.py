"""Tokens with their probabilities: of what is written, and of a prompt."""

import tracemalloc

import numpy as np
import pytest
from odd import export_over_bytes, make_grouped, make_model

import lm.batch
from lm.batch import Batch
from lm.logprobs import Scored, logprobs
from lm.runtime import Generator
from lm.sampling import Sampling
from lm.text import Done, Request, Text

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=[make_model, make_grouped], ids=["latent", "grouped"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(export_over_bytes(tmp_path_factory.mktemp("int8"), request.param))


def scored(model: Generator, request: Request, held: Batch | None = None) -> tuple[str, list[Scored], Text]:
    """Returns what was told, the scores that were taken with it, and the text itself."""
    batch, text = held or Batch(model, 1), model.text(request)
    batch.add(text)
    told, scores = "", []
    while text.done is None:
        for _, piece in batch.step():
            told += piece
            taken = text.take_scores()
            # None comes before its text.
            assert all(one.at < len(told) or text.done for one in taken)
            scores += taken
    return told, scores, text


def shares(model: Generator, ids: list[int]) -> np.ndarray:
    """Returns the logarithms of the probabilities [length, vocabulary] after each of ``ids``, read one by one."""
    cache = model.new_cache()
    lines = [model.run(np.array([[one]], np.int64), cache)[0, 0].astype(np.float64) for one in ids]
    return np.stack([line - np.log(np.exp(line).sum()) for line in lines])


def check_near(found: list[float | None], expected: list[float]) -> None:
    """Fails unless they are alike: where a value tips over a rounding boundary, what comes after it differs a little.

    Sums over one token and over several are taken in another order.
    """
    apart = np.abs(np.array(found, np.float64) - np.array(expected))
    assert len(found) == len(expected)
    assert np.median(apart) < 0.02
    # Of another token it would be nats.
    assert apart.max() < 0.5


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.5, 0, seed=3, frequency_penalty=0.5)], ids=["greedy", "drawn"])
def test_each_written_token_has_the_models_own_probability(model: Generator, sampling: Sampling) -> None:
    _, scores, text = scored(model, Request("light", 12, sampling, logprobs=3))
    assert text.done is not None
    assert (text.done.ending, len(scores)) == ("length", 12)
    read = len(text.ids)
    expected = shares(model, text.tokens.tolist())[read - 1 : -1]
    likely = [line[token] for line, token in zip(expected, text.tokens[read:], strict=True)]
    check_near([one.logprob for one in scores], likely)
    check_near(
        [other.logprob for one in scores for other in one.likeliest],
        [share for line in expected for share in np.sort(line)[:-4:-1]],
    )
    for one in scores:
        if sampling is GREEDY:
            assert (one.likeliest[0].text, one.likeliest[0].logprob) == (one.text, one.logprob)


def test_a_prompt_is_scored_in_pieces_and_whatever_a_row_holds(
    model: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "in the beginning was the night"
    ids = model.text(Request(prompt, 1)).ids
    expected = shares(model, ids)[:-1]
    likely = [line[token] for line, token in zip(expected, ids[1:], strict=True)]
    for piece in (256, 7, 1):
        monkeypatch.setattr(lm.batch, "PIECE", piece)
        batch = Batch(model, 1)
        # The beginning that the row holds is no reason to leave its scores out.
        for _ in range(2):
            told, scores, text = scored(model, Request(prompt, 0, GREEDY, echo=True, logprobs=1), batch)
            assert told == prompt
            assert text.done == Done("length", 31, 0)
            # The first token, which begins texts, comes to nothing.
            assert [one.text for one in scores] == ["", *prompt]
            assert [one.at for one in scores] == [0, *range(30)]
            assert (scores[0].logprob, scores[0].likeliest) == (None, ())
            check_near([one.logprob for one in scores[1:]], likely)
            check_near([one.likeliest[0].logprob for one in scores[1:]], expected.max(axis=1).tolist())


def test_an_echo_is_the_prompt_and_what_is_written_after_it(model: Generator) -> None:
    plain = "".join(model.generate(Request("light", 9, GREEDY)))
    # A string that is to stop what is written may stand in the prompt.
    for count in (None, 0):
        request = Request("light", 9, GREEDY, ("light",), echo=True, logprobs=count)
        told, scores, text = scored(model, request)
        assert told == f"light{plain}"
        assert text.new_tokens == 9
        assert len(scores) == (0 if count is None else 15)
        assert all(one.likeliest == () for one in scores)
    assert "".join(model.generate(Request("light", 0, GREEDY))) == ""


def test_what_a_stop_takes_from_the_text_is_not_scored(model: Generator) -> None:
    letters = tuple((model.tokenizer.token_to_id(letter), 100.0) for letter in "abcdefgh")
    sampling = Sampling(1.0, 0, seed=3, bias=letters)
    whole = "".join(model.generate(Request("light", 20, sampling)))
    assert len(whole) == 20
    stop = whole[8:11]
    end = whole.index(stop)
    told, scores, text = scored(model, Request("light", 20, sampling, (stop,), logprobs=0))
    assert text.done is not None
    assert (told, text.done.ending) == (whole[:end], "stop")
    assert [one.text for one in scores] == list(told)
    # Nor is it told in an echo.
    assert scored(model, Request("light", 20, sampling, (stop,), echo=True))[0] == f"light{whole[:end]}"


def test_penalties_are_for_what_was_written_and_not_for_the_prompt(model: Generator) -> None:
    letters = "abcdefgh"
    bias = tuple((model.tokenizer.token_to_id(letter), 100.0) for letter in letters)
    sampling = Sampling(0.0, bias=bias, frequency_penalty=1000.0)
    # Each is written once, and then there are none left.
    text = "".join(model.generate(Request(letters, 9, sampling)))
    assert sorted(text[:8]) == list(letters)
    assert len(text) < 9 or text[8] not in letters


def test_a_repetition_is_one_of_the_prompt_too(model: Generator) -> None:
    # The prompt has every token but one, and they count for less.
    spared = model.tokenizer.token_to_id("e")
    prompt = tuple(token for token in range(model.vocab_size) if token != spared)[-60:]
    text = model.text(Request(prompt, 1, Sampling(0.0, repetition_penalty=100.0)))
    logits = np.full((1, model.vocab_size), -9.0, np.float32)
    logits[0, list(prompt)], logits[0, spared] = 2.0, 1.0
    text.take([], logits)
    assert text.tokens[-1] == spared


def test_half_a_character_has_no_text_of_its_own_and_is_scored(model: Generator) -> None:
    told, scores, _ = scored(model, Request("a\u20acb", 0, GREEDY, echo=True, logprobs=0))
    assert told == "a\u20acb"
    assert [one.text for one in scores] == ["", "a", *["\ufffd"] * 3, "b"]
    assert [one.at for one in scores] == [0, 0, 1, 1, 1, 2]


def test_the_likeliest_come_first_and_shares_are_of_all_tokens() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.25, 0.05], np.float32)) + 1000
    own, best = logprobs(logits, 3, 2)
    assert own == pytest.approx(np.log(0.05), abs=1e-3)
    assert best == [(1, pytest.approx(np.log(0.6), abs=1e-3)), (2, pytest.approx(np.log(0.25), abs=1e-3))]
    assert logprobs(logits, 1, 0)[1] == []
    assert [one for one, _ in logprobs(logits, 1, 20)[1]] == [1, 2, 0, 3]


def test_scoring_a_token_of_a_large_vocabulary_takes_less_than_three_times_its_logits() -> None:
    logits = np.random.default_rng(0).standard_normal(150_000).astype(np.float32)
    tracemalloc.start()
    try:
        own, _ = logprobs(logits, 3, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Time goes by memory here; a prompt that is scored keeps other texts waiting.
    assert peak < 3 * logits.nbytes
    exact = logits.astype(np.float64)
    assert own == pytest.approx(exact[3] - np.log(np.exp(exact).sum()), abs=1e-6)
