"""``overnight rebuild``: computes a version anew from its raw data, compares every hash, and writes a certificate.

It works in a Git worktree at the version's commit, with the version's own code, parameters and pipeline, and touches
nothing of the project but ``.overnight``. Killed, it leaves no process; the next attempt goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows import (
    certificate,
    certificate_page,
    contents,
    dvc,
    environment,
    failures,
    lock,
    project,
    registry,
    restore,
    virtual_environment,
    worktree,
)
from flows.certificate import Certificate, InputResult, MetricResult, OutputResult, StageResult, Verdict
from flows.contents import Output
from flows.environment import Environment
from flows.execute import logged
from flows.git import AS_COMMITTED, git
from flows.registry import Version
from flows.terminal import Terminal, print_line, speaker
from flows.watch import StageRun
from tasks import atomic, paths
from tasks.errors import TryAgain, UserMistake

EXIT_CODES = {Verdict.IDENTICAL: 0, Verdict.TOLERANCE: 3, Verdict.DIFFERS: 1}
EXIT_FAILED = 1
FOLDER = paths.SCRATCH / "rebuilds"
# How the names of its worktrees begin.
WORKTREE = "rebuild-"
_JOURNAL = paths.SCRATCH / "rebuild.json"
_LOGS = paths.SCRATCH / "logs" / "rebuild"
_LAST_LINES = 15


class Journal(BaseModel):
    """What a rebuild has done so far, kept in its worktree. ``stages``: those computed, with their seconds."""

    model_config = ConfigDict(frozen=True)

    commit: str
    environment: Environment
    attempts: int = 0
    stages: Mapping[str, float] = {}
    # The worktree of a rebuild that ended with a difference stays, to be looked at; the next one begins anew.
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a rebuild works: the project, the worktree, the interpreter of the stages, the descriptor of its lock."""

    root: Path
    place: Path
    python: Path
    lock: int


def rebuild(name: str, own_environment: bool, out: Console, err: Console) -> int:
    """Rebuilds the version ``name`` and returns the exit code: 0 identical, 3 within tolerance, else 1.

    With ``own_environment`` the stages run in a virtual environment made from the version's own lock file. Raises
    :class:`tasks.errors.UserMistake` when there is no such version, :class:`TryAgain` when it is being rebuilt already.
    """
    root = project.find()
    version = registry.resolve_with(root, name, project.parameters(root).publish.git_remote, speaker(err))
    tag_object = git(root, "rev-parse", "--verify", "--quiet", f"refs/tags/{version.tag}", check=False)
    outputs = contents.recorded(root, version.commit)
    recorded = environment.recorded(root, version.commit)
    with alone(root, version.name, speaker(err)) as descriptor:
        python = None
        if own_environment:
            wanted = recorded.python if recorded else _this_python()
            python = virtual_environment.build(root, version.commit, wanted, descriptor, speaker(err))
        place, journal = _begin(root, version, python, outputs)
        site = Site(root, place, python or Path(sys.executable), descriptor)
        _check_whole(site, version, outputs)
        stages = {output.stage for output in outputs if output.stage is not None}
        differences = environment.compare(recorded, journal.environment, stages) if recorded else ()
        for difference in differences:
            speaker(err)(f"environment: {difference}")
        if unknown := recorded.unknown if recorded else ():
            speaker(err)(f"environment: it is not known in which {', '.join(unknown)} ran")
        with dvc.store(root, restore.remote(root)) as store:
            inputs = [output for output in outputs if output.stage is None]
            with restore.progress("restore", err) as report:
                fetched = restore.place(store, inputs, place, root, report)
            if restore.tell(store, version.name, fetched, err):
                return EXIT_FAILED
            done = _compute(site, journal, err)
            if done is None:
                return EXIT_FAILED
            results = tuple(_compare(store, site, output) for output in outputs if output.stage is not None)
            equal, metrics = _metrics(store, site, outputs, results)
        verdict, reason = certificate.judge(results, metrics, differences if recorded else None, unknown)
        made = Certificate(
            version=version.name, tag=version.tag, commit=version.commit, at=datetime.now().astimezone(),
            verdict=verdict, reason=reason, attempts=done.attempts,
            inputs=tuple(InputResult(path=str(one.path), md5=one.md5) for one in inputs),
            stages=tuple(StageResult(stage=stage, seconds=seconds) for stage, seconds in done.stages.items()),
            outputs=results, metrics_compared=metrics is not None, equal_metrics=equal, metrics=metrics or (),
            environment_recorded=recorded is not None, environment=differences, unknown=unknown,
            here=journal.environment, tag_object=tag_object or None,
        )  # fmt: skip
        _end(site, version, done, made, outputs, out)
    return EXIT_CODES[verdict]


def at_work(root: Path, name: str) -> bool:
    """Whether the version ``name`` is being rebuilt now."""
    return lock.holder(root / FOLDER / name) is not None


@contextlib.contextmanager
def alone(root: Path, name: str, tell: Callable[[str], object] = lambda line: None) -> Iterator[int]:
    """Keeps others from rebuilding the version ``name``; yields the lock's descriptor. Raises :class:`TryAgain`."""
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(lock.hold(root / FOLDER / name, f"{WORKTREE}{name}", tell=tell))
        except lock.Held:
            raise TryAgain(f"{name} is being rebuilt by another process. Wait until that has ended.") from None
        yield held


def _begin(root: Path, version: Version, python: Path | None, outputs: Sequence[Output]) -> tuple[Path, Journal]:
    """Returns the worktree, and the journal of this attempt: a stopped one goes on if it had the same environment."""
    name = _worktree(version)
    place = worktree.add(root, name, version.commit)
    here = environment.record(place, python)
    journal = Journal(commit=version.commit, environment=here)
    try:
        found = Journal.model_validate_json((place / _JOURNAL).read_bytes())
    except (OSError, ValidationError):
        found = None
    if found and not found.ended and (found.commit, found.environment) == (version.commit, here):
        journal = found
        _as_committed(place, version.commit, outputs)
    else:
        worktree.remove(root, name)
        place = worktree.add(root, name, version.commit)
    journal = journal.model_copy(update={"attempts": journal.attempts + 1})
    _write(place, journal)
    return place, journal


def _as_committed(place: Path, commit: str, outputs: Sequence[Output]) -> None:
    """Makes the code in a worktree what ``commit`` says, whatever was edited or added there. Outputs stay."""
    computed = [f":(exclude){output.path}" for output in outputs if output.stage is not None]
    git(place, "reset", "--quiet", commit)
    git(place, "checkout", "--quiet", "--force", commit, "--", ".", *computed, environment=AS_COMMITTED)
    git(place, "clean", "--quiet", "--force", "-d", "--", ".", f":(exclude){paths.SCRATCH}", *computed)


def _check_whole(site: Site, version: Version, outputs: Sequence[Output]) -> None:
    """Raises :class:`UserMistake` when the version records nothing of what a stage makes, a tag set by hand perhaps.

    The rest of it may come out as recorded, and would pass for the whole.
    """
    recorded = {output.path for output in outputs}
    with contextlib.chdir(site.place):
        stages = dvc.graph(site.place).stages
    if lacking := [f"{path} ({stage.name})" for stage in stages for path in stage.outputs if path not in recorded]:
        raise UserMistake(
            f"{version.name}: its dvc.lock records no hash of {', '.join(lacking)}, so there is nothing to compare "
            "that with, and it is no whole version. Choose another of `overnight versions`."
        )


def _compute(site: Site, journal: Journal, err: Console) -> Journal | None:
    """Runs every stage that the journal lacks; returns the journal then, or None when a stage failed."""
    # PYTHONPATH and the like would put other code before the version's own.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    inner = dvc.environment(outer, site.python)
    # DVC names stages relative to the current directory, and the stages' code is found there.
    with contextlib.chdir(site.place), Terminal(err) as terminal:
        for stage in dvc.graph(site.place).stages:
            if stage.name in journal.stages:
                terminal.ended(StageRun(stage.name, "cached", 0.0, "computed before the rebuild was stopped"))
                continue
            log = _LOGS / f"{failures.file_name(stage.name)}.log"
            log.unlink(missing_ok=True)
            started = time.monotonic()
            command = dvc.rebuild_command(stage.name, site.python)
            result = logged(command, log, inner, terminal.event, [site.lock])
            seconds = time.monotonic() - started
            if result.outcome == "failed":
                terminal.ended(StageRun(stage.name, "failed", seconds, result.message))
                err.print(f"[bold red]error:[/] {escape(f'{stage.name}: {result.message}')}", soft_wrap=True)
                for line in log.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
                    print_line(err, f"  {line}", "dim")
                print_line(err, f"The whole log: {site.place / log}")
                return None
            terminal.ended(StageRun(stage.name, "ran", seconds))
            journal = journal.model_copy(update={"stages": {**journal.stages, stage.name: seconds}})
            _write(site.place, journal)
    return journal


def _compare(store: dvc.Store, site: Site, output: Output) -> OutputResult:
    place = site.place / output.path
    stage = output.stage or ""
    if not output.is_folder:
        rebuilt = contents.md5_of(place) if place.is_file() else None
        return OutputResult(path=str(output.path), stage=stage, recorded=output.md5, rebuilt=rebuilt, files=1)
    files = contents.files_of(place)
    rebuilt = contents.listing_md5(files) if place.is_dir() else None
    result = OutputResult(
        path=str(output.path), stage=stage, recorded=output.md5, rebuilt=rebuilt, files=len(files)
    )  # fmt: skip
    if result.identical:
        return result
    listing, _ = restore.read(store, output.path, output.md5, site.root)
    if listing is None:
        return result
    return result.model_copy(update={"differing": certificate.compare_files(contents.parse_listing(listing), files)})


def _metrics(
    store: dvc.Store, site: Site, outputs: Sequence[Output], results: Sequence[OutputResult]
) -> tuple[int, tuple[MetricResult, ...] | None]:
    """Returns how many values of the metrics files are equal, and the others; None where they cannot be compared."""
    with contextlib.chdir(site.place):
        names = set(dvc.metrics(site.place))
    same = {result.path for result in results if result.identical}
    equal, unequal = 0, list[MetricResult]()
    for output in outputs:
        if output.path not in names:
            continue
        try:
            rebuilt = (site.place / output.path).read_bytes()
            recorded = rebuilt if str(output.path) in same else _read(store, site, output)
            # A project whose metrics are others is judged by all of them.
            measured = output.path == paths.EVALUATION or paths.EVALUATION not in names
            count, others = certificate.compare_metrics(str(output.path), recorded, rebuilt, measured)
        except (OSError, ValueError):
            return equal, None
        equal += count
        unequal += others
    return equal, tuple(unequal)


def _put_back(site: Site, made: Certificate, outputs: Sequence[Output], say: Callable[[str], object]) -> None:
    """Gives DVC's cache what it has lost, or holds damaged, of the outputs that came out as recorded, and says so."""
    identical, count = {result.path for result in made.outputs if result.identical}, 0
    try:
        with dvc.store(site.root, restore.remote(site.root)) as store:
            for output in outputs:
                if output.stage is not None and str(output.path) in identical:
                    count += _put_back_one(store, site.place / output.path, output)
            there = store.remote
    except (OSError, ValueError, UserMistake, TryAgain) as error:
        # The certificate is there; this is beside it.
        say(f"DVC's cache was not given back what it may have lost: {error}")
        return
    if count:
        more = f": `overnight push {made.version}` brings what is missing to '{there}'" if there else ""
        say(f"objects that DVC's cache had lost are there again ({count}){more}.")


def _put_back_one(store: dvc.Store, place: Path, output: Output) -> int:
    wanted: list[tuple[str, Callable[[Path], bool]]] = []
    if output.is_folder:
        found = contents.files_of(place)
        listing = contents.listing(found)
        wanted = [(md5, functools.partial(restore.copy_if_there, place / path)) for path, md5 in found.items()]
        wanted.append((output.md5, lambda to: bool(to.write_bytes(listing))))
    else:
        wanted.append((output.md5, functools.partial(restore.copy_if_there, place)))
    return sum(_mended(store.path(md5), md5.removesuffix(contents.FOLDER_SUFFIX), fill) for md5, fill in wanted)


def _mended(cached: Path, digest: str, fill: Callable[[Path], bool]) -> bool:
    is_whole = cached.is_file() and contents.md5_of(cached) == digest
    return not is_whole and restore.heal(cached, digest, fill)


def _read(store: dvc.Store, site: Site, output: Output) -> bytes:
    content, fetched = restore.read(store, output.path, output.md5, site.root)
    if content is None:
        raise FileNotFoundError(str(fetched))
    return content


def _end(
    site: Site, version: Version, journal: Journal, made: Certificate, outputs: Sequence[Output], out: Console
) -> None:
    data, page = certificate_page.write(site.root, made)
    table = Table(box=None, pad_edge=False, show_header=False)
    for output in made.outputs:
        table.add_row(output.path, "[green]identical[/]" if output.identical else "[bold red]differs[/]")
    out.print(table)
    print_line(out, f"{made.tag}: {made.verdict}: {made.reason}.")
    print_line(out, f"certificate: {page} (and {data.name})")
    _put_back(site, made, outputs, functools.partial(print_line, out))
    if made.verdict is Verdict.IDENTICAL:
        worktree.remove(site.root, _worktree(version))
        return
    _write(site.place, journal.model_copy(update={"ended": True}))
    where = site.place.relative_to(site.root.resolve())
    print_line(out, f"what was rebuilt: {where} (until the next rebuild)")


def _worktree(version: Version) -> str:
    return f"{WORKTREE}{version.name}"


def _write(place: Path, journal: Journal) -> None:
    atomic.write_json(place / _JOURNAL, journal.model_dump(mode="json"))


def _this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
