"""The gate: three checks, each by the upper end of a 95% interval over documents, each with its reason in one line."""

from tasks.bootstrap import Estimate
from tasks.evaluate.params import EvaluateParams
from tasks.evaluate.report import ChampionResult, Check, CheckName, Gate

_NO_INTERVAL = (
    "one document gives no interval; raise evaluate.test_tokens in params.yaml where the test split has more, else "
    "bring more groups of text, or raise ingest.split.test"
)
# What fine-tunes gains by steps; most schemes do not.
_ROUNDING = "raise quantize.steps, take another quantize.scheme, or raise evaluate.max_relative_loss"
# A limit of more is told rounded.
_MOST_DIGITS = 12


def decide(
    relative_loss: Estimate,
    champion: ChampionResult | None,
    bits_per_byte: Estimate,
    limits: EvaluateParams,
    unmeasured: str | None = None,
) -> Gate:
    """Returns the verdict. ``relative_loss`` is INT8's against float's, ``bits_per_byte`` INT8's own.

    ``unmeasured`` is the version of a champion that could not be measured.
    """
    checks = (
        _against_float(relative_loss, limits.max_relative_loss),
        _against_champion(champion, limits.max_regression, unmeasured),
        _absolute(bits_per_byte, limits.max_bits_per_byte),
    )
    passed = all(check.passed for check in checks)
    return Gate(passed=passed, relative_loss=relative_loss, limit=limits.max_relative_loss, checks=checks)


def _against_float(loss: Estimate, limit: float) -> Check:
    told = _change(loss, limit, of="float")
    return _check("int8_against_float", loss, limit, told, _ROUNDING)


def _against_champion(champion: ChampionResult | None, limit: float, unmeasured: str | None) -> Check:
    if unmeasured is not None:
        told = (
            f"{unmeasured} was exported by another version of Overnight, or has another tokenizer for conversations, "
            "so it could not be measured beside this one; "
            "compare their bits per byte (`overnight versions`), then `overnight promote` this one by hand"
        )
        return Check(name="against_champion", passed=False, limit=limit, reason=told)
    if champion is None:
        return Check(name="against_champion", passed=True, limit=limit, reason="no champion yet")
    told = _change(champion.relative_loss, limit, of=champion.version)
    if not champion.same_split:
        told += f" (text was split otherwise then: {champion.version} may have been trained on this text)"
    return _check("against_champion", champion.relative_loss, limit, told, f"{champion.version} stays the champion")


def _absolute(bits: Estimate, limit: float | None) -> Check:
    if limit is None:
        return Check(
            name="bits_per_byte",
            passed=True,
            value=bits.value,
            low=bits.low,
            high=bits.high,
            reason="no limit on bits per byte is set",
        )
    digits = _digits(bits.high, limit, 3)
    high = "" if bits.high is None else f", at most {bits.high:.{digits}f}"
    told = f"INT8 needs {bits.value:.{digits}f} bits a byte{high}; the limit is {limit:.{digits}f}"
    return _check("bits_per_byte", bits, limit, told, "train longer, or raise evaluate.max_bits_per_byte")


def _check(name: CheckName, estimate: Estimate, limit: float, told: str, advice: str) -> Check:
    passed = estimate.high is not None and estimate.high < limit
    if estimate.high is None:
        told = f"{told}; {_NO_INTERVAL}"
    elif not passed:
        told = f"{told}; {advice}"
    return Check(
        name=name,
        passed=passed,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        limit=limit,
        reason=told,
    )


def _change(loss: Estimate, limit: float, of: str) -> str:
    digits = _digits(loss.high, limit, 4) - 2
    high = "" if loss.high is None else f" (at most {loss.high:+.{digits}%})"
    return f"INT8's loss against {of}'s: {loss.value:+.{digits}%}{high}; the limit is {limit:+.{digits}%}"


def _digits(high: float | None, limit: float, least: int) -> int:
    """Returns how many digits, ``least`` or more, show ``limit`` as it is set, and ``high`` on its side of it."""
    end = limit if high is None else high
    for digits in range(least, _MOST_DIGITS):
        shown, rounded = round(limit, digits), round(end, digits)
        if shown == limit and (rounded < shown, rounded > shown) == (end < limit, end > limit):
            return digits
    return _MOST_DIGITS
