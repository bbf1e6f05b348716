"""What a run ends with: the stages, and when there is a model, where it lies and how good it is."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.terminal import print_line
from tasks import paths

NOT_ASSESSED = "not assessed"
_SAMPLE_TOKENS = 40
_BEGINNING_CHARACTERS = 24
_WIDEST = 10_000
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


class Check(_Part):
    """One check of the gate; without a limit there was nothing to check."""

    passed: bool
    limit: float | None = None
    reason: str


class Gate(_Part):
    """Whether the model may take the champion's place, and why."""

    passed: bool
    checks: tuple[Check, ...]


class Evaluation(_Part):
    """``models/evaluation.json``."""

    models: Models = Models()
    baselines: Baselines = Baselines()
    gate: Gate | None = None


class Records(_Part):
    """Of one source: how many records came in, and why some were not kept."""

    total: int = Field(alias="in")
    reasons: Mapping[str, int]


class Source(_Part):
    """One source of the corpus."""

    records: Records


class Corpus(_Part):
    """``data/corpus/report.json``."""

    sources: tuple[Source, ...] = ()


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


def read_corpus(root: Path) -> Corpus:
    """Returns what became of the records, as :func:`read_evaluation` does."""
    try:
        return Corpus.model_validate_json((root / paths.CORPUS_REPORT).read_bytes())
    except (OSError, ValidationError):
        return Corpus()


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
    _print(console, table)


def show_model(console: Console, root: Path) -> None:
    """Prints where card and INT8 model lie, what was rejected, bits per byte, the gate, and a line of generated text.

    What speaks against the model comes last.
    """
    if not (root / paths.INT8_GRAPH).is_file():
        return
    evaluation = read_evaluation(root)
    table = Table(box=None, pad_edge=False, show_header=False)
    card = paths.CARD / "README.md"
    table.add_row("card", str(card) if (root / card).is_file() else NOT_ASSESSED)
    table.add_row("INT8 model", str(paths.INT8_GRAPH))
    if rejected := describe_rejected(read_corpus(root)):
        table.add_row("rejected", rejected)
    table.add_row("bits per byte, held out", "")
    for name, scored in (
        ("  INT8", evaluation.models.int8),
        ("  float", evaluation.models.float),
        ("  n-gram baseline", evaluation.baselines.ngram),
        ("  xz -9 baseline", evaluation.baselines.xz),
    ):
        table.add_row(name, describe(scored.bits_per_byte if scored else None))
    verdict, *reasons = describe_gate(evaluation.gate)
    table.add_row("gate", verdict)
    for reason in reasons:
        table.add_row("", reason)
    table.add_row("it writes", Text(sample(root), overflow="ellipsis", no_wrap=True))
    _print(console, table)
    for objection in objections(evaluation):
        console.print(Text(objection, style=_STYLES["failed"]), soft_wrap=True)


def _print(console: Console, table: Table) -> None:
    if console.is_terminal:
        console.print(table)
        return
    # A file has no width: rich would wrap at 80 columns, and fill each line up to the widest one.
    wide = Console(file=io.StringIO(), width=_WIDEST, force_terminal=False)
    with wide.capture() as captured:
        wide.print(table)
    for line in captured.get().splitlines():
        print_line(console, line.rstrip())


def objections(evaluation: Evaluation) -> list[str]:
    """Returns what speaks against the INT8 model, a line each: worse than a baseline, and last, refused by the gate."""
    found = []
    int8 = evaluation.models.int8.bits_per_byte if evaluation.models.int8 else None
    for name, scored in (("n-gram", evaluation.baselines.ngram), ("xz -9", evaluation.baselines.xz)):
        if int8 and scored and scored.bits_per_byte and int8.value >= scored.bits_per_byte.value:
            found.append(
                f"this model is WORSE than the {name} baseline: "
                f"{int8.value:.3f} against {scored.bits_per_byte.value:.3f} bits per byte"
            )
    if evaluation.gate is not None and not evaluation.gate.passed:
        reasons = "; ".join(check.reason for check in evaluation.gate.checks if not check.passed)
        found.append(f"the gate REFUSED this model: {reasons}")
    return found


def describe_rejected(corpus: Corpus) -> str:
    """Returns ``3 of 1,206 records (2 missing field, 1 malformed JSON); FILE``, or nothing when all were kept."""
    total = sum(source.records.total for source in corpus.sources)
    reasons: Counter[str] = Counter()
    for source in corpus.sources:
        reasons.update(source.records.reasons)
    if not reasons.total():
        return ""
    named = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return f"{reasons.total():,} of {total:,} records ({named}); {paths.QUARANTINE}"


def describe(estimate: Estimate | None) -> str:
    """Returns ``2.345 (2.300 to 2.390)``, or that it was not assessed."""
    if estimate is None:
        return NOT_ASSESSED
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def describe_gate(gate: Gate | None) -> list[Text]:
    """Returns the verdict, then a line for each check that has a limit: those that refused the model come first."""
    if gate is None:
        return [Text(NOT_ASSESSED)]
    refused = [Text(f"refused: {check.reason}", style=_STYLES["failed"]) for check in gate.checks if not check.passed]
    passed = [Text(check.reason) for check in gate.checks if check.passed and check.limit is not None]
    verdict = Text("passed") if gate.passed else Text("REFUSED", style=_STYLES["failed"])
    return [verdict, *refused, *passed]


def sample(root: Path) -> str:
    """Returns one line: the first words of a held-out text, and how the INT8 model goes on."""
    from flows.generate import Writing, continue_text

    try:
        beginning = _beginning(root)
        pieces = continue_text(root / paths.INT8, beginning, Writing(_SAMPLE_TOKENS))
        return " ".join((beginning + "".join(pieces)).split())
    except Exception as error:
        # The run has succeeded; a model that cannot speak is told, not raised.
        return f"nothing: {type(error).__name__}: {error}"


def _beginning(root: Path) -> str:
    """Returns how the first test document begins, in whole words where it has spaces; of a conversation a greeting.

    Raises :class:`OSError` when there is no such document.
    """
    import pyarrow.parquet as pq

    parts = sorted((root / paths.CORPUS / "test").glob("*.parquet"))
    if not parts:
        raise FileNotFoundError(f"{paths.CORPUS / 'test'}: no text")
    with pq.ParquetFile(parts[0]) as part:
        rows = next(part.iter_batches(1)).to_pylist()
    if rows[0].get("is_conversation"):
        return "Hello"
    beginning = " ".join(rows[0]["text"].split())[:_BEGINNING_CHARACTERS]
    return beginning.rpartition(" ")[0] or beginning
