"""Writes the certificate of a rebuild, as JSON and as a page of Markdown."""

import itertools
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from flows.certificate import (
    ABSOLUTE_TOLERANCE,
    RELATIVE_TOLERANCE,
    SHARE,
    SHARE_TOLERANCE,
    Certificate,
    FileResult,
    MetricResult,
    Number,
    Verdict,
)
from flows.environment import facts_of
from tasks import atomic, paths
from tasks.markdown import cell

FOLDER = paths.SCRATCH / "certificates"
_MOST_FILES = 20
# What the reader of a page would take for more than it is.
_MEANING = {
    Verdict.TOLERANCE: (
        "",
        "This shows that the version's code makes a model from its data that measures alike here. It does not prove "
        "that the recorded bytes came from them: what was measured here is the rebuilt model, and the recorded bytes "
        "are vouched for by their hashes in the tag's dvc.lock alone.",
    )
}


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
            f"| {one.fact} | {cell(one.recorded)} | {cell(one.here)} "
            f"| {'' if one.has_effect else 'changes no number'} |"
            for one in certificate.environment
        ]
    if certificate.unknown:
        told = ", ".join(certificate.unknown)
        lines += ["", f"Not known, as they ran on another machine or outside of `overnight run`, is that of: {told}."]
    if certificate.here is not None:
        lines += ["", "All facts here:", "", "| fact | here |", "|---|---|"]
        lines += [f"| {fact} | {cell(value)} |" for fact, value in facts_of(certificate.here).items()]
    lines += ["", "## Stages", "", "| stage | seconds |", "|---|--:|"]
    lines += [f"| {one.stage} | {one.seconds:,.1f} |" for one in certificate.stages]
    return "\n".join(lines) + "\n"


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
    return f"{value:.6g}" if isinstance(value, float) else cell(str(value))
