"""What the gate decided, check by check: at the top of a refused model's card, and in a section of every card."""

from typing import Any

from tasks.card.evidence import NOT_ASSESSED, Report
from tasks.markdown import table

_CHECKS = {
    "int8_against_float": "INT8 against float",
    "against_champion": "against the champion",
    "bits_per_byte": "bits per byte",
}


def in_a_word(evaluation: Report) -> str:
    """Returns whether the model passed."""
    return evaluation.tell("gate.passed", lambda passed: "passed" if passed else "**refused**")


def warning(evaluation: Report) -> list[str]:
    """Returns the paragraph that a refused model's card begins with, and nothing for any other."""
    if evaluation.get("gate.passed") is not False:
        return []
    reasons = [f"> - {check['reason']}" for check in _checks(evaluation) if not check["passed"]]
    return ["\n".join(["> **Refused.** The gate refuses this model; it is not meant for production.", ">", *reasons])]


def section(evaluation: Report) -> str:
    """Returns each check with its verdict and its reason."""
    rows = [
        [_CHECKS.get(check["name"], check["name"]), "passed" if check["passed"] else "**refused**", check["reason"]]
        for check in _checks(evaluation)
    ]
    if not rows:
        return NOT_ASSESSED
    return "\n\n".join(
        [
            "Each limit is held against the upper end of a 95% interval over the test documents; two models are paired "
            "by document. A model that one check refuses stays a version but is not promoted.",
            table(["check", "verdict", "why"], rows),
        ]
    )


def of_check(evaluation: Report, name: str) -> str:
    """Returns the reason of one check."""
    return next((str(check["reason"]) for check in _checks(evaluation) if check["name"] == name), NOT_ASSESSED)


def _checks(evaluation: Report) -> list[dict[str, Any]]:
    return list(evaluation.get("gate.checks") or [])
