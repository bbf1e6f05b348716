"""``overnight diff A B``: what differs between two versions, from Git's objects and DVC's cache, without a checkout."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows import contents, dvc, environment, objects, project, registry
from flows.contents import Output
from flows.git import GitFailed, commit_of, git, show
from flows.land import is_pointer
from flows.leaves import leaves
from flows.terminal import print_line
from tasks import paths
from tasks.errors import TryAgain, UserMistake

ABSENT = "-"
_MOST_FILES = 10
# How a path names one of a list.
_ITEM = "[{}]"
# Of measurements that cannot be read: two of these are not the same.
NOT_KNOWN = "not in DVC's cache nor at its remote"


@dataclasses.dataclass(frozen=True)
class Change:
    """One value that differs, as it is shown; ``-`` where a side has none."""

    name: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Files:
    """How a folder of data differs: the paths of files below it, in order."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = {"added": self.added, "removed": self.removed, "changed": self.changed}
        return ", ".join(f"{len(files)} {how}" for how, files in counts.items() if files) or "the same files"


@dataclasses.dataclass(frozen=True)
class Difference:
    """All that differs between two commits; ``code`` are lines of Git.

    ``data`` is None where a listing is lost, ``environment`` where one of the two records none that can be read,
    ``metrics`` where one of them, the commit ``unmeasured``, has none at all.
    ``lost``: why what cannot be read is neither in DVC's cache nor at its remote, a line each.
    """

    parameters: tuple[Change, ...]
    data: Files | None
    code: tuple[str, ...]
    environment: tuple[Change, ...] | None
    metrics: tuple[Change, ...] | None
    unmeasured: str | None = None
    lost: tuple[str, ...] = ()


def diff(first: str, second: str, out: Console, err: Console) -> int:
    """Shows what differs between two versions, or any two Git revisions, and returns the exit code, 0."""
    root = project.find()
    where = project.parameters(root).publish
    registry.fetch_if_it_answers(root, where.git_remote, functools.partial(print_line, err))
    before, after = resolve(root, first), resolve(root, second)
    found = compare(root, before, after, where.data_remote)
    show_difference(out, found)
    if found.lost:
        print_line(err, found.lost[0])
    return 0


def resolve(root: Path, text: str) -> str:
    """Returns the commit of a version or of any Git revision. Raises :class:`UserMistake` when it is neither."""
    try:
        return registry.resolve(root, text).commit
    except registry.NoSuchVersion as unknown:
        try:
            return commit_of(root, text)
        except GitFailed:
            raise UserMistake(f"{unknown} Git knows no revision of that name either.") from None


def compare(root: Path, before: str, after: str, remote: str | None = None) -> Difference:
    """Returns what differs between two commits. What DVC's cache has lost comes from its remote."""
    lost: list[str] = []
    with dvc.store(root, remote) as store:
        outputs = [{one.path: one for one in _recorded(root, commit)} for commit in (before, after)]
        listings = [_files(store, found.get(paths.RAW), lost) for found in outputs]
        # Equal bytes need not be read.
        changed = [{path: one for path, one in found.items() if not _same(outputs, path)} for found in outputs]
        files = [_metrics_files(root, *pair) for pair in zip((before, after), outputs, strict=True)]
        metrics = [dict(_metrics(store, *pair, lost)) for pair in zip(files, changed, strict=True)]
    unmeasured = next((one for one, held in zip((before, after), files, strict=True) if not held and any(files)), None)
    theirs, ours = (environment.recorded(root, commit) for commit in (before, after))
    facts = environment.compare(theirs, ours) if theirs is not None and ours is not None else None
    return Difference(
        parameters=differing(*(dict(leaves(_parameters(root, commit), _ITEM)) for commit in (before, after))),
        data=None if None in listings else differing_files(*(listing or {} for listing in listings)),
        code=_code(root, before, after),
        environment=None if facts is None else tuple(Change(one.fact, one.recorded, one.here) for one in facts),
        metrics=None if unmeasured else differing(*_known(*metrics)),
        unmeasured=unmeasured,
        lost=tuple(lost),
    )


def _same(outputs: Sequence[Mapping[Path, Output]], path: Path) -> bool:
    return len({found[path].md5 if path in found else None for found in outputs}) == 1


def _known(*metrics: Mapping[str, object]) -> list[dict[str, object]]:
    """Returns ``metrics`` with one line for each file that cannot be read in one of them."""
    lost = {name for side in metrics for name, value in side.items() if value == NOT_KNOWN}
    found: list[dict[str, object]] = []
    for side in metrics:
        kept = {name: value for name, value in side.items() if name.split(".")[0] not in lost}
        found.append(kept | {name: NOT_KNOWN if side.get(name) == NOT_KNOWN else "known" for name in sorted(lost)})
    return found


def differing(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[Change, ...]:
    """Returns the names whose values are not the same, in the order of ``before``, then what only ``after`` has."""
    missing = object()
    return tuple(
        Change(name, *(_shown(side[name]) if name in side else ABSENT for side in (before, after)))
        for name in {**before, **after}
        if before.get(name, missing) != after.get(name, missing) or before.get(name) == NOT_KNOWN
    )


def differing_files(before: Mapping[PurePosixPath, str], after: Mapping[PurePosixPath, str]) -> Files:
    """Returns how two listings of a folder, path to MD5, differ."""
    return Files(
        added=tuple(sorted(map(str, after.keys() - before.keys()))),
        removed=tuple(sorted(map(str, before.keys() - after.keys()))),
        changed=tuple(sorted(str(path) for path in before.keys() & after.keys() if before[path] != after[path])),
    )


def show_difference(console: Console, found: Difference) -> None:
    """Prints a section for each kind of difference; ``none`` where there is none."""
    _changes(console, "parameters", found.parameters)
    _heading(console, "data")
    if found.data is None:
        _line(console, "not known: a list of files is neither in DVC's cache nor at its remote (`dvc fetch -T`)")
    else:
        _line(console, f"{paths.RAW}: {found.data}")
        for how, files in (("+", found.data.added), ("-", found.data.removed), ("~", found.data.changed)):
            for file in files[:_MOST_FILES]:
                _line(console, f"{how} {file}")
            if len(files) > _MOST_FILES:
                _line(console, f"{how} and {len(files) - _MOST_FILES} more")
    _heading(console, "code")
    for line in found.code or ("none",):
        _line(console, line)
    if found.environment is None:
        _heading(console, "environment")
        _line(console, f"not known: {environment.FILE} is not there, or cannot be read, on one side or both")
    else:
        _changes(console, "environment", found.environment)
    if found.metrics is None:
        _heading(console, "metrics")
        told = f"{found.unmeasured}: no results of a run are committed there; `overnight versions` lists what has some"
        _line(console, told)
    else:
        _changes(console, "metrics", found.metrics)


def _recorded(root: Path, commit: str) -> Sequence[Output]:
    # Any revision may be compared, one without a pipeline too.
    return () if show(root, commit, "dvc.lock") is None else contents.recorded(root, commit)


def _parameters(root: Path, commit: str) -> object:
    return _yaml(root, commit, paths.PARAMS)


def _yaml(root: Path, commit: str, path: Path) -> Any:
    try:
        return YAML(typ="safe").load(show(root, commit, path) or b"") or {}
    except YAMLError:
        raise UserMistake(f"{commit[:12]}: {path} is not YAML, so it cannot be compared.") from None


def _files(store: dvc.Store, output: Output | None, lost: list[str]) -> dict[PurePosixPath, str] | None:
    if output is None:
        return {}
    try:
        return contents.parse_listing(objects.read(store, output))
    except (objects.Unlisted, TryAgain) as error:
        lost.append(str(error))
        return None


def _metrics_files(root: Path, commit: str, outputs: Mapping[Path, Output]) -> list[Path]:
    """Returns the metrics files that ``commit`` has."""
    stages = (_yaml(root, commit, Path("dvc.yaml")).get("stages") or {}).values()
    entries = [entry for stage in stages for entry in stage.get("metrics") or []]
    files = [Path(next(iter(entry)) if isinstance(entry, Mapping) else entry) for entry in entries]
    return [path for path in files if path.suffix == ".json" and path in outputs]


def _metrics(
    store: dvc.Store, files: Sequence[Path], outputs: Mapping[Path, Output], lost: list[str]
) -> Iterator[tuple[str, object]]:
    for path in filter(outputs.__contains__, files):
        try:
            content = json.loads(objects.read(store, outputs[path]))
        except (objects.Unlisted, TryAgain) as error:
            lost.append(str(error))
            content = NOT_KNOWN
        except ValueError:
            content = NOT_KNOWN
        yield from leaves(content, _ITEM, path.stem)


def _code(root: Path, before: str, after: str) -> tuple[str, ...]:
    names = git(root, "diff", "--name-only", "--relative", "-z", before, after, "--", ".").split("\0")
    code = [name for name in names if name and not is_pointer(name) and Path(name) != paths.PARAMS]
    if not code:
        return ()
    told = git(root, "-c", "color.ui=false", "diff", "--relative", "--stat=100", before, after, "--", *code)
    return tuple(line.strip() for line in told.splitlines())


def _shown(value: object) -> str:
    # Of numbers every digit: two that differ are not to be shown alike.
    return "null" if value is None else str(value)


def _changes(console: Console, heading: str, changes: Sequence[Change]) -> None:
    _heading(console, heading)
    if not changes:
        _line(console, "none")
    elif console.is_terminal:
        table = Table(box=None, pad_edge=False, show_header=False)
        for change in changes:
            table.add_row("", *(Text(text) for text in (change.name, change.before, "→", change.after)))
        console.print(table)
    else:
        for change in changes:
            _line(console, f"{change.name}: {change.before} -> {change.after}")


def _heading(console: Console, text: str) -> None:
    console.print(Text(text, style="bold"))


def _line(console: Console, text: str) -> None:
    print_line(console, f"  {text}")
