"""The gate as a table of cases: three checks over documents, each with its reason."""

import numpy as np
import pytest

from tasks.bootstrap import Bootstrap, Estimate, Values
from tasks.evaluate import gate, report
from tasks.evaluate.params import EvaluateParams
from tasks.evaluate.report import Check, Gate
from tasks.evaluate.score import Marks, Quantized, Scores

BYTES = 300.0
LIMITS = EvaluateParams(
    seed=0, bootstrap_samples=500, max_relative_loss=0.02, max_regression=0.01, max_bits_per_byte=None, ngram_order=2,
    threads=1,
)  # fmt: skip


def decide(
    float_nats: Values,
    int8: Values,
    champion: Values | None = None,
    same_split: bool = True,
    max_regression: float = 0.01,
    max_bits_per_byte: float | None = None,
) -> Gate:
    """Returns the verdict on models with these losses, in nats a document."""
    limits = LIMITS.model_copy(update={"max_regression": max_regression, "max_bits_per_byte": max_bits_per_byte})
    documents = len(float_nats)
    ones = np.ones(documents)
    quantized = Quantized(int8, ones, [np.zeros(1)] * documents, ones, np.zeros((documents, 0)))
    scores = Scores(ones, np.full(documents, BYTES), Marks(float_nats, ones), {"int8": quantized})
    bootstrap = Bootstrap(documents, limits.bootstrap_samples, limits.seed)
    against = None if champion is None else report.champion("lm@v1.2.0", champion, scores, bootstrap, same_split)
    measured = report.models(scores, bootstrap, ()).int8
    return gate.decide(measured.relative_loss, against, measured.bits_per_byte, limits)


def check(gate: Gate, name: str) -> Check:
    assert gate.passed == all(one.passed for one in gate.checks)
    assert all("\n" not in one.reason for one in gate.checks)
    return next(one for one in gate.checks if one.name == name)


def losses(documents: int = 200) -> Values:
    return np.random.default_rng(3).uniform(100, 200, documents)


def noisy(nats: Values, loss: float, noise: float, seed: int = 4) -> Values:
    """Returns losses that are ``loss`` higher in the mean, each document by another share."""
    return nats * (1 + loss + np.random.default_rng(seed).normal(0, noise, len(nats)))


@pytest.mark.parametrize(("loss", "noise", "passed"), [(0.0, 0.001, True), (0.019, 0.2, False), (0.03, 0.001, False)])
def test_int8_is_held_against_float_by_the_intervals_upper_end(loss: float, noise: float, passed: bool) -> None:
    nats = losses()
    verdict = decide(nats, noisy(nats, loss, noise))
    found = check(verdict, "int8_against_float")
    assert (verdict.passed, found.passed) == (passed, passed)
    assert found.high is not None
    assert passed == (found.high < 0.02)
    assert (verdict.relative_loss.value, verdict.limit) == (found.value, 0.02)
    # What to do is said only where something is to be done.
    assert ("quantize.steps" in found.reason) is not passed
    # Most schemes take no steps.
    assert ("another quantize.scheme" in found.reason) is not passed


@pytest.mark.parametrize(
    ("loss", "noise", "passed"),
    [
        (0.0, 0.0, True),
        (-0.05, 0.01, True),
        (0.05, 0.001, False),
        # Worse by less than the limit: accepted when that is certain, refused when it may as well be more.
        (0.005, 0.01, True),
        (0.005, 0.2, False),
        # Better in the mean, but it might as well be worse.
        (-0.001, 0.3, False),
    ],
)
def test_a_candidate_is_held_against_the_champion(loss: float, noise: float, passed: bool) -> None:
    champion = losses()
    candidate = noisy(champion, loss, noise)
    verdict = decide(candidate, candidate, champion)
    found = check(verdict, "against_champion")
    assert (verdict.passed, found.passed) == (passed, passed)
    assert "lm@v1.2.0" in found.reason
    assert ("stays the champion" in found.reason) is not passed


def test_pairing_finds_what_two_intervals_side_by_side_would_hide() -> None:
    champion = losses(40)
    candidate = noisy(champion, 0.03, 0.005)
    scores = Bootstrap(40, 500, 0)
    apart = [scores.ratio(nats, np.full(40, BYTES)) for nats in (champion, candidate)]
    assert apart[0].high is not None
    assert apart[1].low is not None
    # Each by itself, their intervals overlap.
    assert apart[1].low < apart[0].high
    assert not check(decide(candidate, candidate, champion), "against_champion").passed


def test_without_a_champion_and_without_an_absolute_limit_these_checks_pass_and_say_so() -> None:
    nats = losses()
    verdict = decide(nats, nats)
    assert verdict.passed
    assert check(verdict, "against_champion").reason == "no champion yet"
    assert check(verdict, "against_champion").value is None
    assert check(verdict, "bits_per_byte").reason == "no limit on bits per byte is set"


def test_a_champion_of_another_split_may_have_seen_the_text() -> None:
    champion = losses()
    worse = noisy(champion, 0.05, 0.001)
    refused = check(decide(worse, worse, champion, same_split=False), "against_champion")
    assert not refused.passed
    assert "lm@v1.2.0 may have been trained on this text" in refused.reason
    assert "trained on this text" not in check(decide(worse, worse, champion), "against_champion").reason


def test_a_negative_limit_asks_for_a_better_model() -> None:
    champion = losses()
    better = noisy(champion, -0.01, 0.001)
    assert check(decide(better, better, champion, max_regression=-0.005), "against_champion").passed
    assert not check(decide(better, better, champion, max_regression=-0.02), "against_champion").passed
    assert not check(decide(champion, champion, champion, max_regression=-0.005), "against_champion").passed


@pytest.mark.parametrize(("limit", "passed"), [(1.0, True), (0.75, True), (0.73, False), (0.5, False)])
def test_the_absolute_limit_is_held_against_the_intervals_upper_end(limit: float, passed: bool) -> None:
    nats = losses()
    found = check(decide(nats, nats, max_bits_per_byte=limit), "bits_per_byte")
    assert found.value == pytest.approx(nats.sum() / len(nats) / BYTES / np.log(2), abs=1e-6)
    assert found.low is not None
    assert found.high is not None
    # One limit lies between the value and the upper end.
    assert found.value < 0.73 < found.high < 0.75
    assert found.passed is passed


@pytest.mark.parametrize(
    ("high", "limit", "told"),
    [
        (0.0049, 0.02, "against float's: +0.10% (at most +0.49%); the limit is +2.00%"),
        (0.019999, 0.02, "against float's: +0.1000% (at most +1.9999%); the limit is +2.0000%"),
        (0.020001, 0.02, "against float's: +0.1000% (at most +2.0001%); the limit is +2.0000%"),
        # A limit is told as it is set.
        (0.00123, 0.00125, "against float's: +0.100% (at most +0.123%); the limit is +0.125%"),
        (0.02, 0.02, "against float's: +0.10% (at most +2.00%); the limit is +2.00%"),
    ],
)
def test_what_is_told_of_a_narrow_verdict_has_the_digits_that_show_it(high: float, limit: float, told: str) -> None:
    estimate = Estimate(value=0.001, low=-0.001, high=high)
    verdict = gate.decide(estimate, None, estimate, LIMITS.model_copy(update={"max_relative_loss": limit}))
    assert verdict.passed is (high < limit)
    assert told in check(verdict, "int8_against_float").reason


def test_bits_per_byte_are_told_with_the_digits_that_show_the_verdict() -> None:
    none, bits = Estimate(value=0.0, low=0.0, high=0.0), Estimate(value=1.2, low=1.1, high=1.234499)
    for limit, told in (
        (1.2345, "1.200000 bits a byte, at most 1.234499; the limit is 1.234500"),
        (1.5, "at most 1.234; "),
    ):
        verdict = gate.decide(none, None, bits, LIMITS.model_copy(update={"max_bits_per_byte": limit}))
        assert verdict.passed
        assert told in check(verdict, "bits_per_byte").reason


def test_one_document_gives_no_interval_and_no_check_passes_on_it() -> None:
    nats = losses(1)
    verdict = decide(nats, nats, nats, max_bits_per_byte=100.0)
    assert [one.passed for one in verdict.checks] == [False, False, False]
    assert all(one.low is None and one.high is None for one in verdict.checks)
    assert all("one document gives no interval" in one.reason for one in verdict.checks)
    # It may be the only one that was drawn of several.
    assert all("raise evaluate.test_tokens" in one.reason for one in verdict.checks)
    assert not verdict.passed
