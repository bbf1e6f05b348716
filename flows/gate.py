"""The gate's verdict on a model, as ``models/evaluation.json`` has it."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import paths
from tasks.errors import UserMistake

# How the verdict in a tag's message begins.
PASSED, REFUSED = "The gate passed", "Refused"


class Check(BaseModel):
    """One check of the gate; ``reason`` is one line."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    passed: bool
    reason: str


class Gate(BaseModel):
    """The part of ``models/evaluation.json`` that decides what is promoted."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    passed: bool
    checks: tuple[Check, ...] = ()

    @property
    def message(self) -> str:
        """The message of the version's tag: the verdict, and below it each check."""
        refused = "; ".join(check.reason for check in self.checks if not check.passed)
        verdict = f"{PASSED}." if self.passed else f"{REFUSED} by the gate: {refused}"
        return "\n".join([verdict, "", *(f"{check.name}: {check.reason}" for check in self.checks)]).strip()


def read_gate(root: Path) -> Gate:
    """Returns the gate's verdict. Raises :class:`UserMistake` when the evaluation has none."""
    try:
        content = (root / paths.EVALUATION).read_bytes()
        return Gate.model_validate(_Evaluation.model_validate_json(content).gate)
    except (OSError, ValidationError) as error:
        raise UserMistake(
            f"{paths.EVALUATION}: no verdict of the gate here ({type(error).__name__}). Run `overnight run` first."
        ) from None


class _Evaluation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    gate: dict[str, object]
