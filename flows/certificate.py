"""The certificate of a rebuild: what came out the same, what did not, and what else was not the same.

The verdict is a pure function of recorded and rebuilt hashes, of the metrics, and of the two environments.
"""

import enum
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from flows.environment import Difference, Environment, facts_of
from flows.leaves import leaves
from tasks import atomic, paths

FOLDER = paths.SCRATCH / "certificates"
# Two numbers agree when they differ by at most 1% of the larger, or by 0.001 where they are near zero, as a loss
# relative to another one is. With other kernels of the same CPU the held-out loss moved by less than a ten thousandth.
RELATIVE_TOLERANCE = 0.01
ABSOLUTE_TOLERANCE = 0.001
# Shares of what is the same in two models hang on values that tip over where they are rounded. With other kernels of
# the same CPU that of the likeliest tokens moved by 0.013, while no loss did by a thousandth: it has a tolerance of its
# own. That of the experts moved by 0.13, which says nothing of the model, and is not judged.
SHARE, SHARE_TOLERANCE = "same_top_1", 0.02
UNJUDGED = "same_experts"
_MOST_FILES = 20
_MOST_FACTS = 3

Number = int | float


class Verdict(enum.StrEnum):
    """What a rebuild shows."""

    # Every output has the recorded bytes.
    IDENTICAL = "identical"
    # Bytes differ, so does what may have caused that in the environment, and every metric agrees.
    TOLERANCE = "within tolerance"
    DIFFERS = "differs"


# What the reader of a page would take for more than it is.
_MEANING = {
    Verdict.TOLERANCE: (
        "",
        "This shows that the version's code makes a model from its data that measures alike here. It does not prove "
        "that the recorded bytes came from them: what was measured here is the rebuilt model, and the recorded bytes "
        "are vouched for by their hashes in the tag's dvc.lock alone.",
    )
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class FileResult(_Part):
    """A file of a folder that did not come out the same. A hash is None where there is no such file."""

    path: str
    recorded: str | None
    rebuilt: str | None


class OutputResult(_Part):
    """One output: its recorded and its rebuilt MD5, how many files it has, and those that differ, where known."""

    path: str
    stage: str
    recorded: str
    rebuilt: str | None
    files: int
    differing: tuple[FileResult, ...] = ()

    @property
    def identical(self) -> bool:
        return self.recorded == self.rebuilt


class InputResult(_Part):
    """What the rebuild began with, restored and verified: a file or folder under ``dvc add``."""

    path: str
    md5: str


class StageResult(_Part):
    """A stage that was computed anew, and in how many seconds."""

    stage: str
    seconds: float


class MetricResult(_Part):
    """One value of a metrics file; None where a side lacks it. Only values that are not equal are listed.

    ``measured``: it belongs to the evaluation on held-out text. What training reports of itself, such as how evenly the
    experts were used in its last steps, says nothing about the model's quality and is listed without being judged.
    Neither does the share of tokens for which INT8 chooses the same experts.
    """

    file: str
    name: str
    recorded: bool | Number | str | None
    rebuilt: bool | Number | str | None
    measured: bool = True

    @property
    def judged(self) -> bool:
        """Whether the verdict depends on it. Sentences only repeat numbers, rounded."""
        sentence = isinstance(self.recorded, str) or isinstance(self.rebuilt, str)
        return self.measured and not sentence and UNJUDGED not in self._parts

    @property
    def difference(self) -> float | None:
        """Rebuilt minus recorded; None where one of the two is no number."""
        if _is_number(self.recorded) and _is_number(self.rebuilt):
            return float(self.rebuilt) - float(self.recorded)  # type: ignore[arg-type]
        return None

    @property
    def agrees(self) -> bool:
        """Whether the two agree within the tolerance; what is no number has to be equal."""
        if self.difference is None:
            return False
        if SHARE in self._parts:
            return abs(self.difference) <= SHARE_TOLERANCE
        return math.isclose(
            float(self.rebuilt),  # type: ignore[arg-type]
            float(self.recorded),  # type: ignore[arg-type]
            rel_tol=RELATIVE_TOLERANCE,
            abs_tol=ABSOLUTE_TOLERANCE,
        )

    @property
    def _parts(self) -> list[str]:
        return re.split(r"[.\[]", self.name)


class Certificate(_Part):
    """The whole of it. ``attempts`` above 1: the rebuild was stopped and went on from its own checkpoints.

    ``commit`` is the version's, and that of the code which computed it anew.
    """

    version: str
    tag: str
    commit: str
    at: datetime
    verdict: Verdict
    reason: str
    attempts: int
    inputs: tuple[InputResult, ...]
    stages: tuple[StageResult, ...]
    outputs: tuple[OutputResult, ...]
    # False where the metrics of one side could not be read.
    metrics_compared: bool
    # How many values of the metrics files are equal, and those that are not.
    equal_metrics: int
    metrics: tuple[MetricResult, ...]
    # False where the version records no environment that can be read.
    environment_recorded: bool
    environment: tuple[Difference, ...]
    # The stages of which the version does not know in what environment they ran.
    unknown: tuple[str, ...] = ()
    # The environment of the rebuild, and the object that the tag was then; None where they were not noted yet.
    here: Environment | None = None
    tag_object: str | None = None


def judge(
    outputs: Sequence[OutputResult],
    metrics: Sequence[MetricResult] | None,
    environment: Sequence[Difference] | None,
    unknown: Sequence[str] = (),
) -> tuple[Verdict, str]:
    """Returns the verdict and its reason in one sentence.

    ``metrics`` are those that are not equal, None where the recorded ones are lost; ``environment`` is None where none
    is recorded; ``unknown`` are stages whose own is not known. Bytes that differ though nothing recorded does are not
    excused by any tolerance: the same machine gives the same bytes, so that something is wrong with the code, the data
    or the record.
    """
    changed = [output.path for output in outputs if not output.identical]
    if not changed:
        return Verdict.IDENTICAL, f"all {len(outputs)} outputs have the recorded bytes"
    told = f"{len(changed)} of {len(outputs)} outputs differ ({', '.join(changed)})"
    missing = [output.path for output in outputs if output.rebuilt is None]
    if missing:
        return Verdict.DIFFERS, f"{told}, and {len(missing)} of them were not made ({', '.join(missing)})"
    if metrics is None:
        return Verdict.DIFFERS, f"{told}, and the recorded metrics are lost"
    far = [metric.name for metric in metrics if metric.judged and not metric.agrees]
    if far:
        return Verdict.DIFFERS, f"{told}, and {len(far)} metrics are out of tolerance, the first is {far[0]}"
    if environment is None:
        return Verdict.DIFFERS, f"{told}, and the version records no environment that could explain it"
    lacking = f"; it is not known in which {', '.join(unknown)} ran" if unknown else ""
    if not environment:
        return Verdict.DIFFERS, f"{told}, though every recorded fact of the environment is the same{lacking}"
    facts = [one.fact for one in environment if one.has_effect]
    if not facts:
        told = f"{told}, and what is another one in the environment changes no number"
        return Verdict.DIFFERS, f"{told} ({_few([one.fact for one in environment])}){lacking}"
    told = f"{told}, all metrics agree within the tolerance, and the environment is another one"
    return Verdict.TOLERANCE, f"{told} ({_few(facts)}){lacking}"


def compare_files(
    recorded: Mapping[PurePosixPath, str], rebuilt: Mapping[PurePosixPath, str]
) -> tuple[FileResult, ...]:
    """Returns the files whose MD5s are not the same on both sides, in order."""
    return tuple(
        FileResult(path=str(path), recorded=recorded.get(path), rebuilt=rebuilt.get(path))
        for path in sorted({*recorded, *rebuilt})
        if recorded.get(path) != rebuilt.get(path)
    )


def compare_metrics(file: str, recorded: bytes, rebuilt: bytes, measured: bool) -> tuple[int, tuple[MetricResult, ...]]:
    """Returns how many values of two JSON files are equal, and those that are not. Raises :class:`ValueError`."""
    before, after = (dict(leaves(json.loads(content), "[{}]")) for content in (recorded, rebuilt))
    unequal = tuple(
        MetricResult(file=file, name=name, recorded=before.get(name), rebuilt=after.get(name), measured=measured)
        for name in {**before, **after}
        if name not in before or name not in after or before[name] != after[name]
    )
    return len({*before, *after}) - len(unequal), unequal


def write(root: Path, certificate: Certificate) -> tuple[Path, Path]:
    """Writes the certificate as JSON and as a page of Markdown; returns where, relative to ``root``.

    An earlier one of the same version is kept, with its date in its name.
    """
    data, page = (FOLDER / f"{certificate.version}{ending}" for ending in (".json", ".md"))
    _keep_earlier(root / data, root / page)
    atomic.write_json(root / data, certificate.model_dump(mode="json"))
    atomic.write_text(root / page, render(certificate))
    return data, page


def _keep_earlier(*files: Path) -> None:
    there = [file for file in files if file.exists()]
    if not there:
        return
    try:
        at = Certificate.model_validate_json(there[0].read_bytes()).at
    except ValueError:
        at = datetime.fromtimestamp(there[0].stat().st_mtime).astimezone()
    name = f"{there[0].stem}.{at:%Y%m%d-%H%M%S}"
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = next(one for one in numbered if not any(file.with_name(f"{one}{file.suffix}").exists() for file in files))
    for file in there:
        file.rename(file.with_name(f"{free}{file.suffix}"))


def render(certificate: Certificate) -> str:
    """Returns the page of Markdown."""
    lines = [
        f"# Rebuild of {certificate.tag}: {certificate.verdict}",
        "",
        f"Commit `{certificate.commit}`, rebuilt {certificate.at:%Y-%m-%d %H:%M %Z}: {certificate.reason}.",
        f"Every stage was computed anew by that commit's code, from verified inputs, without any cache"
        f"{_attempts(certificate.attempts)}.",
        *_where(certificate),
        *_MEANING.get(certificate.verdict, ()),
        "",
        "| input, verified | MD5 |",
        "|---|---|",
        *(f"| {one.path} | `{one.md5}` |" for one in certificate.inputs),
        "",
        "| output | stage | files | result | recorded MD5 | rebuilt MD5 |",
        "|---|---|--:|---|---|---|",
        *(
            f"| {one.path} | {one.stage} | {one.files} | {'identical' if one.identical else '**differs**'} "
            f"| `{one.recorded}` | `{one.rebuilt or 'missing'}` |"
            for one in certificate.outputs
        ),
        "",
    ]
    for output in certificate.outputs:
        if output.differing:
            lines += [f"Files of {output.path} that differ:", ""]
            lines += [f"- `{one.path}`{_side(one)}" for one in output.differing[:_MOST_FILES]]
            if len(output.differing) > _MOST_FILES:
                lines.append(f"- and {len(output.differing) - _MOST_FILES} more, all in the JSON beside this page")
            lines.append("")
    lines += ["## Metrics", ""]
    if certificate.metrics:
        lines += [
            f"{certificate.equal_metrics} values are equal. The others, with a tolerance of {RELATIVE_TOLERANCE:.0%}, "
            f"or {ABSOLUTE_TOLERANCE} near zero ({SHARE}: {SHARE_TOLERANCE}):",
            "",
            "| metric | recorded | rebuilt | difference | |",
            "|---|--:|--:|--:|---|",
            *(
                f"| {one.file}: {one.name} | {_show(one.recorded)} | {_show(one.rebuilt)} "
                f"| {_show(one.difference)} | {_judgement(one)} |"
                for one in certificate.metrics
            ),
        ]
    elif certificate.metrics_compared:
        lines.append(f"All {certificate.equal_metrics} values are equal: every difference is 0.")
    else:
        lines.append("They could not be compared: the recorded ones are lost, or one of the two files cannot be read.")
    lines += ["", "## Environment", ""]
    if not certificate.environment_recorded:
        lines.append("The version records no environment that can be read.")
    elif not certificate.environment:
        lines.append("Every recorded fact is the same here.")
    else:
        lines += ["| fact | recorded | here | |", "|---|---|---|---|"]
        lines += [
            f"| {one.fact} | {_cell(one.recorded)} | {_cell(one.here)} "
            f"| {'' if one.has_effect else 'changes no number'} |"
            for one in certificate.environment
        ]
    if certificate.unknown:
        told = ", ".join(certificate.unknown)
        lines += ["", f"Not known, as they ran on another machine or outside of `overnight run`, is that of: {told}."]
    if certificate.here is not None:
        lines += ["", "All facts here:", "", "| fact | here |", "|---|---|"]
        lines += [f"| {fact} | {_cell(value)} |" for fact, value in facts_of(certificate.here).items()]
    lines += ["", "## Stages", "", "| stage | seconds |", "|---|--:|"]
    lines += [f"| {one.stage} | {one.seconds:,.1f} |" for one in certificate.stages]
    return "\n".join(lines) + "\n"


def _few(facts: Sequence[str]) -> str:
    more = len(facts) - _MOST_FACTS
    return ", ".join(facts[:_MOST_FACTS]) + (f" and {more} more" if more > 0 else "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _where(certificate: Certificate) -> Iterator[str]:
    if certificate.here is not None:
        cpu, gpus = certificate.here.cpu, ", ".join(certificate.here.gpus) or "no GPU"
        yield f"The machine: {certificate.here.system}, {cpu.model}, {cpu.cores} cores, {gpus}."
    if certificate.tag_object is not None:
        yield f"The tag was the object `{certificate.tag_object}`."


def _attempts(attempts: int) -> str:
    return f"; it was stopped and went on from its own checkpoints, in {attempts} attempts" if attempts > 1 else ""


def _judgement(metric: MetricResult) -> str:
    if not metric.judged:
        return "not judged"
    return "agrees" if metric.agrees else "**out of tolerance**"


def _side(file: FileResult) -> str:
    if file.recorded is None:
        return " is new"
    return " is missing" if file.rebuilt is None else ""


def _show(value: bool | Number | str | None) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else _cell(str(value))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
