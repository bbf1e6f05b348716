"""``overnight prune``: what no kept version needs, in DVC's cache, at its remote and in ``.overnight``.

Kept is what any tag, branch or stash names, what the project and its worktrees hold uncommitted, and what a run that
can go on would go on with. Nothing goes unless ``--yes`` is given, and nothing while a run is at work.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import psutil
from rich.console import Console

from flows import (
    contents,
    dvc,
    dvc_lock,
    land,
    lock,
    objects,
    project,
    rebuild,
    registry,
    runs,
    virtual_environment,
    worktree,
)
from flows.git import GitFailed, git
from flows.store import Store, Stored
from flows.terminal import print_line
from flows.versions import describe_size
from tasks import paths
from tasks.atomic import PARTIAL
from tasks.errors import TryAgain, UserMistake

# Another machine may have pushed a version's data and not yet its tag.
REMOTE_GRACE_SECONDS = 24 * 3600.0
_MOST_NAMED = 5
Tell = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Leftover:
    """A file or folder that nobody needs; ``why`` in a few words, ``size`` in bytes."""

    path: Path
    why: str
    size: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What would go: objects by MD5 with their sizes in bytes, files and folders, names of worktrees."""

    cache: Mapping[str, int]
    remote: Mapping[str, int]
    leftovers: Sequence[Leftover]
    worktrees: Mapping[str, int]

    @property
    def size(self) -> int:
        """All bytes that would go."""
        sizes = (self.cache.values(), self.remote.values(), self.worktrees.values())
        return sum(map(sum, sizes)) + sum(one.size for one in self.leftovers)


def prune(delete: bool, remote: bool, out: Console, err: Console) -> int:
    """Says what no kept version needs, removes it when ``delete``, and returns the exit code, 0.

    ``remote`` prunes the DVC remote too. Raises :class:`flows.lock.Held` when a run is at work, :class:`UserMistake`
    when it cannot be known what is needed, :class:`TryAgain` when a remote that has to be asked does not answer.
    """
    root = worktree.main(project.find())
    params = project.parameters(root)
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}-prune"
    advice, tell = "`overnight prune` when it has ended.", functools.partial(print_line, err)
    with lock.hold(root, name, tell=tell, advice=advice), contextlib.chdir(root):
        dvc_lock.check_others(root, advice)
        if remote:
            _fetch(root, project.git_remote(root, params))
        with dvc.store(root, params.publish.data_remote) as store:
            if remote and store.remote is None:
                raise UserMistake("--remote: no DVC remote is configured (`dvc remote list`). Leave the option out.")
            found = plan(root, store, remote, tell)
            _show(out, root, found, store.remote, delete)
            if delete:
                if found.remote:
                    # Another machine may have published since, and named what nobody needed then.
                    _fetch(root, project.git_remote(root, params))
                    found = dataclasses.replace(found, remote=_still_surplus(root, store, found))
                _remove(root, store, found)
    return 0


def plan(root: Path, store: Store, remote: bool, tell: Tell = lambda line: None) -> Plan:
    """Returns what nobody needs any more, as things are now. Removes nothing."""
    _check_cache(root, store)
    there = set(worktree.names(root))
    dead = {run.run for run in finished(runs.read(root))} & there
    dead |= {name for name in there if (version := _rebuilt(name)) and not rebuild.at_work(root, version)}
    needed = _needed(root, store, dead, tell)
    stored = store.stored() if remote else {}
    return Plan(
        cache={md5: size for md5, size in sorted(store.cached().items()) if md5 not in needed},
        remote=surplus(stored, needed, time.time()),
        leftovers=(*_leftovers(root), *_left_by_versions(root, store.folder)),
        worktrees={name: _size(root / worktree.FOLDER / name) for name in sorted(dead)},
    )


def surplus(stored: Mapping[str, Stored], needed: set[str], now: float) -> dict[str, int]:
    """Returns the objects of a remote that are not needed, nor so new that a version may be about to name them."""
    return {
        md5: one.size
        for md5, one in sorted(stored.items())
        if md5 not in needed and (one.modified is None or now - one.modified > REMOTE_GRACE_SECONDS)
    }


def finished(known: Sequence[runs.Run]) -> tuple[runs.Run, ...]:
    """Returns those of the runs ``known``, the newest last, with which nobody goes on.

    They are those that ended well, and those from before the last that did.
    """
    well = [place for place, run in enumerate(known) if not run.alive and not run.can_go_on and run.state != "skipped"]
    return tuple(run for run in known[: well[-1] + 1] if not run.alive) if well else ()


def _fetch(root: Path, git_remote: str | None) -> None:
    if git_remote is None:
        raise UserMistake(
            "--remote: other machines may keep versions there, and only a Git remote can tell of them. Set "
            "publish.git_remote in params.yaml, or leave the option out."
        )
    branches = f"+refs/heads/*:refs/remotes/{git_remote}/*"
    try:
        with registry.moves_told(root, git_remote):
            git(root, "fetch", "--quiet", "--tags", "--force", git_remote, branches)
    except GitFailed as error:
        raise TryAgain(f"the Git remote '{git_remote}' does not answer, so nothing is pruned: {error}") from None


def _check_cache(root: Path, store: Store) -> None:
    if not store.folder.resolve().is_relative_to(root.resolve()):
        raise UserMistake(
            f"DVC's cache {store.folder} lies outside the project, so other projects may use it. `dvc gc --projects` "
            "prunes such a cache."
        )


def _needed(root: Path, store: Store, dead: set[str], tell: Tell) -> set[str]:
    """Returns the MD5 of every object that something kept needs."""
    versions = {version.commit: version.name for version in registry.versions(root)}
    known: dict[str, frozenset[str]] = {}
    needed: set[str] = set()
    for commit, name in {**_commits(root, dead), **versions}.items():
        found, lost = objects.findable(store, contents.named(root, commit), known)
        if lost and commit in versions:
            raise UserMistake(f"{name}: {lost[0]} Until then nothing is pruned.")
        needed |= found
        for error in lost:
            # The files of that folder cannot be told from others any more, and could not be checked out either.
            tell(f"{name}: {error}")
    alive = (name for name in worktree.names(root) if name not in dead)
    for place in (root, *(root / worktree.FOLDER / name / worktree.prefix(root) for name in alive)):
        needed |= objects.needed(store, contents.present(place), known)
    return needed


def _commits(root: Path, dead: set[str]) -> dict[str, str]:
    """Returns what Git has a name for: tags, branches here and at remotes, stashes, worktrees but for the dead."""
    found: dict[str, str] = {}
    fields = "%(refname:short) %(objecttype) %(objectname) %(*objecttype) %(*objectname)"
    for line in git(root, "for-each-ref", f"--format={fields}").splitlines():
        name, *pairs = line.split(" ")
        for kind, commit in (pairs[0:2], pairs[2:4]):
            if kind == "commit":
                found.setdefault(commit, name)
    # The ref names the newest stash only.
    for number, commit in enumerate(git(root, "rev-list", "-g", "refs/stash", check=False).split()):
        found.setdefault(commit, f"stash@{{{number}}}")
    for one in worktree.listed(root):
        if one.place.name not in dead:
            found.setdefault(one.head, str(one.place))
    return found


def _leftovers(root: Path) -> Iterator[Leftover]:
    stale = dvc.changes(root).stages
    for stage in sorted((root / paths.CHECKPOINTS).glob("*")):
        keys = sorted((key for key in stage.iterdir() if key.is_dir()), key=lambda key: (key.stat().st_mtime, key.name))
        # A stage that has to run goes on from its newest; one that is up to date needs none. Their names are digests of
        # what the stage reads, which have no order: the newest is the last that was written to, by the clock of then.
        for key in keys[:-1] if stage.name in stale else keys:
            yield Leftover(key, "checkpoints of a run that is over", _size(key))
    for place in (*(root / folder for folder in ("data", "models")), root / paths.CHECKPOINTS):
        for partial in sorted(place.rglob(f"{PARTIAL}*")):
            if not any(parent.name.startswith(PARTIAL) for parent in partial.relative_to(root).parents):
                yield Leftover(partial, "half-written when a run was killed", _size(partial))
    for merge in sorted((root / paths.SCRATCH).glob(f"{land.SCRATCH}*")):
        yield Leftover(merge, "a merge that was killed", _size(merge))


def _left_by_versions(root: Path, cache: Path) -> Iterator[Leftover]:
    """Yields what `overnight restore` and `overnight rebuild` leave."""
    for partial in sorted(cache.glob(f"??/{PARTIAL}*")):
        # A restoration takes no lock, and its process is in the name.
        pid = partial.name.removeprefix(PARTIAL).partition("-")[0]
        if not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            yield Leftover(partial, "half-written when a command was killed", _size(partial))
    if any(rebuild.at_work(root, place.name) for place in (root / rebuild.FOLDER).glob("*")):
        return
    # Last what the others say is there.
    for place in sorted((root / virtual_environment.FOLDER).glob("*"), reverse=True):
        yield Leftover(place, "of a rebuild in an environment of its own", _size(place))


def _rebuilt(worktree: str) -> str | None:
    """Returns the version that is rebuilt in the worktree of this name."""
    return worktree.removeprefix(rebuild.WORKTREE) if worktree.startswith(rebuild.WORKTREE) else None


def _still_surplus(root: Path, store: Store, found: Plan) -> dict[str, int]:
    needed = _needed(root, store, set(found.worktrees), lambda line: None)
    return {md5: size for md5, size in found.remote.items() if md5 not in needed}


def _remove(root: Path, store: Store, found: Plan) -> None:
    if found.remote:
        store.discard(found.remote, remote=True)
    store.discard(found.cache)
    for one in found.leftovers:
        if one.path.name.startswith(land.SCRATCH):
            worktree.discard(root, one.path)
        elif one.path.is_dir():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)
    for name in found.worktrees:
        version = _rebuilt(name)
        with rebuild.alone(root, version) if version else contextlib.nullcontext():
            worktree.remove(root, name)


def _show(out: Console, root: Path, found: Plan, remote: str | None, delete: bool) -> None:
    def line(text: str) -> None:
        print_line(out, text)

    for where, gone in (("DVC's cache", found.cache), (f"DVC's remote '{remote}'", found.remote)):
        if gone:
            line(f"{where}: {len(gone)} objects, {describe_size(sum(gone.values()))}")
    for name, size in found.worktrees.items():
        whose = "rebuild" if _rebuilt(name) else "run"
        line(f"{worktree.FOLDER / name}: the worktree of a {whose} that is over, {describe_size(size)}")
    for one in found.leftovers[:_MOST_NAMED]:
        line(f"{one.path.relative_to(root)}: {one.why}, {describe_size(one.size)}")
    if len(found.leftovers) > _MOST_NAMED:
        line(f"and {len(found.leftovers) - _MOST_NAMED} more")
    if not (found.cache or found.remote or found.leftovers or found.worktrees):
        line("nothing to remove: all that is there is needed.")
    elif delete:
        line(f"removed {describe_size(found.size)}.")
    else:
        line(f"{describe_size(found.size)} in all; `overnight prune --yes` removes it.")


def _size(place: Path) -> int:
    files = [place] if place.is_file() else (file for file in place.rglob("*") if not file.is_symlink())
    return sum(file.stat().st_size for file in files if file.is_file())
