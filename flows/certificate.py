"""The certificate of a rebuild: what came out the same, what did not, and what else was not the same.

The verdict is a pure function of recorded and rebuilt hashes, of the metrics, and of the two environments.
:mod:`flows.certificate_page` writes the whole.
"""

import enum
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict

from flows.environment import Difference, Environment
from flows.leaves import leaves

# Two numbers agree when they differ by at most 1% of the larger, or by 0.001 where they are near zero, as a loss
# relative to another one is. With other kernels of the same CPU the held-out loss moved by less than a ten thousandth.
RELATIVE_TOLERANCE = 0.01
ABSOLUTE_TOLERANCE = 0.001
# Shares of what is the same in two models hang on values that tip over where they are rounded. With other kernels of
# the same CPU that of the likeliest tokens moved by 0.013, while no loss did by a thousandth: it has a tolerance of its
# own. That of the experts moved by 0.13, which says nothing of the model, and is not judged.
SHARE, SHARE_TOLERANCE = "same_top_1", 0.02
UNJUDGED = "same_experts"
_MOST_FACTS = 3

Number = int | float


class Verdict(enum.StrEnum):
    """What a rebuild shows."""

    # Every output has the recorded bytes.
    IDENTICAL = "identical"
    # Bytes differ, so does what may have caused that in the environment, and every metric agrees.
    TOLERANCE = "within tolerance"
    DIFFERS = "differs"


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


def _few(facts: Sequence[str]) -> str:
    more = len(facts) - _MOST_FACTS
    return ", ".join(facts[:_MOST_FACTS]) + (f" and {more} more" if more > 0 else "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
