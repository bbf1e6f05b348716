"""What a run ends with: the stages, and when there is a model, where it lies and how good it is."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks import paths

NOT_ASSESSED = "not assessed"
_SAMPLE_TOKENS = 40
_SAMPLE_PROMPT = "In the beginning"
_STYLES = {"ran": "green", "cached": "dim", "skipped": "yellow", "failed": "bold red"}


class _Part(BaseModel):
    """A part of ``models/evaluation.json``; what this summary does not show is left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Estimate(_Part):
    """A number and, where it was bootstrapped, its 95% interval."""

    value: float
    low: float | None = None
    high: float | None = None


class Scored(_Part):
    """Whatever has bits per byte."""

    bits_per_byte: Estimate | None = None


class Models(_Part):
    """The two models."""

    float: Scored | None = None
    int8: Scored | None = None


class Baselines(_Part):
    """What the models must beat."""

    ngram: Scored | None = None
    xz: Scored | None = None


class Gate(_Part):
    """Whether INT8 lost little enough against float."""

    passed: bool
    limit: float
    relative_loss: Estimate


class Evaluation(_Part):
    """``models/evaluation.json``."""

    models: Models = Models()
    baselines: Baselines = Baselines()
    gate: Gate | None = None


class StageLine(BaseModel):
    """One line of the table of stages."""

    model_config = ConfigDict(frozen=True)

    stage: str
    outcome: str
    seconds: float
    message: str


def read_evaluation(root: Path) -> Evaluation:
    """Returns what was measured; where the file is missing or unreadable, nothing was."""
    try:
        return Evaluation.model_validate_json((root / paths.EVALUATION).read_bytes())
    except (OSError, ValidationError):
        return Evaluation()


def show_stages(console: Console, lines: Sequence[StageLine], seconds: float) -> None:
    """Prints the table of stages and the time of the whole run, in seconds."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for line in lines:
        table.add_row(
            line.stage,
            Text(line.outcome, style=_STYLES[line.outcome]),
            Text(f"{line.seconds:,.1f} s" if line.outcome in ("ran", "failed") else "", justify="right"),
            line.message if line.outcome == "skipped" else "",
        )
    table.add_row("in all", "", Text(f"{seconds:,.1f} s", justify="right"), "")
    console.print(table)


def show_model(console: Console, root: Path) -> None:
    """Prints where card and INT8 model lie, held-out bits per byte, the gate, and a line of generated text."""
    if not (root / paths.INT8_GRAPH).is_file():
        return
    evaluation = read_evaluation(root)
    table = Table(box=None, pad_edge=False, show_header=False)
    card = paths.CARD / "README.md"
    table.add_row("card", str(card) if (root / card).is_file() else NOT_ASSESSED)
    table.add_row("INT8 model", str(paths.INT8_GRAPH))
    table.add_row("bits per byte, held out", "")
    for name, scored in (
        ("  INT8", evaluation.models.int8),
        ("  float", evaluation.models.float),
        ("  n-gram baseline", evaluation.baselines.ngram),
        ("  xz -9 baseline", evaluation.baselines.xz),
    ):
        table.add_row(name, describe(scored.bits_per_byte if scored else None))
    table.add_row("gate", describe_gate(evaluation.gate))
    table.add_row("it writes", Text(sample(root), overflow="ellipsis", no_wrap=True))
    console.print(table)


def describe(estimate: Estimate | None) -> str:
    """Returns ``2.345 (2.300 to 2.390)``, or that it was not assessed."""
    if estimate is None:
        return NOT_ASSESSED
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def describe_gate(gate: Gate | None) -> str:
    """Returns whether INT8 passed, its loss against float, and the limit, all in percent."""
    if gate is None:
        return NOT_ASSESSED
    loss = gate.relative_loss
    high = "" if loss.high is None else f", at most {loss.high:+.2%}"
    verdict = "passed" if gate.passed else "not passed"
    return f"{verdict}: INT8's loss is {loss.value:+.2%} of float's{high}; the limit is {gate.limit:+.2%}"


def sample(root: Path) -> str:
    """Returns one line that the INT8 model writes."""
    from flows.generate import continue_text

    try:
        pieces = continue_text(root / paths.INT8, _SAMPLE_PROMPT, max_new_tokens=_SAMPLE_TOKENS)
        return " ".join((_SAMPLE_PROMPT + "".join(pieces)).split())
    except Exception as error:
        # The run has succeeded; a model that cannot speak is told, not raised.
        return f"nothing: {type(error).__name__}: {error}"
