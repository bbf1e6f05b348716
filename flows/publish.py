"""``overnight publish``: makes a version of what the project holds now.

Push the data, commit, push Git, gate, register, promote: in this order, so that no tag names bytes that the remote
lacks. Each step finds what an earlier attempt has done, so a publication that was killed is finished by the next one.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from flows import computed, dvc, environment, execute, lock, project, pushed, registry, remotely, worktree
from flows.execute import LOGS
from flows.gate import PASSED, Gate, read_gate
from flows.git import Declined, GitFailed, author, branch, commit_of, git, is_ancestor
from flows.graph import Graph
from flows.identity import version_of
from flows.land import QUIET, is_pointer, land
from flows.registry import Version
from flows.store import REFUSED
from flows.terminal import print_line
from tasks import paths
from tasks.champion import Champion
from tasks.champion import read as read_champion
from tasks.errors import TryAgain, UserMistake
from tasks.params import Params
from tasks.progress import Event

_MOST_NAMED = 3
Result = TypeVar("Result")
Tell = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Published:
    """What a publication did.

    ``version`` holds the project's present outputs; ``new``: this run registered it, else it was a version already.
    ``promoted``: it was put into production now. ``reasons`` are single lines: why it was not, and what else there is
    to know.
    """

    version: Version
    new: bool
    promoted: bool
    reasons: tuple[str, ...]

    @property
    def commit(self) -> str:
        """The version's commit."""
        return self.version.commit


class ChampionMoved(TryAgain):
    """Another version was promoted since this one was measured. It lies in ``models/champion`` now."""


@dataclasses.dataclass(frozen=True)
class _Publication:
    """One attempt: the project's ``root``, the Git remote's name, whom to tell, where DVC's output goes."""

    root: Path
    params: Params
    remote: str | None
    tell: Tell
    log: Path

    def patiently(self, step: Callable[[], Result]) -> Result:
        """Returns what ``step`` does; where a remote does not answer, waits and tries again, each time for longer.

        What a remote declines it would decline again: that is raised at once.
        """
        retries = self.params.publish.retries
        for attempt in range(retries + 1):
            try:
                return step()
            except (ChampionMoved, Declined):
                raise
            except (GitFailed, TryAgain) as error:
                failure = error
                if attempt < retries:
                    seconds = self.params.flow.retry_delay_seconds * 2**attempt
                    self.tell(f"{_sentence(failure)} Trying again in {seconds:.0f} s.")
                    time.sleep(seconds)
        raise TryAgain(f"{_sentence(failure)} What was done until here is kept; `overnight publish` goes on.")


def publish_by_hand(out: Console, err: Console) -> int:
    """Publishes what the last run in the current folder made, says what became of it, and returns the exit code, 0.

    Raises as :func:`publish` does, and :class:`flows.lock.Held` when a run is at work.
    """
    root = project.find()
    tell = functools.partial(print_line, err)
    with lock.hold(root, _name(), tell=tell, advice="`overnight publish` when it has ended."):
        done = publish(root, tell, by_hand=True)
    if done.new:
        out.print(f"{done.version.name} is published (commit {done.commit[:12]}).", highlight=False)
    if done.promoted:
        out.print(f"{done.version.name} is in production.", highlight=False)
    for reason in done.reasons:
        prefix = "" if done.promoted or not done.new else "not promoted: "
        print_line(out, f"{prefix}{reason}")
    return 0


@dataclasses.dataclass(frozen=True)
class Look:
    """The project's graph and what in it is not up to date, as whoever publishes has just seen them."""

    graph: Graph
    changes: dvc.Changes


def publish(
    root: Path,
    tell: Tell = lambda line: None,
    log: Path | None = None,
    since: str | None = None,
    look: Look | None = None,
    by_hand: bool = False,
) -> Published:
    """Makes a version of the project's outputs, unless they are one, and promotes it when the gate passed.

    On a branch the commit goes onto that branch; at a detached HEAD, as in a night's worktree, onto ``publish.branch``.
    ``log`` is for what DVC says, None for a log of its own. ``since`` is the commit that the run began with: a version
    on the one that it has made since is its own, though an attempt that was killed has registered it. ``look`` spares
    another one. ``by_hand``: a person's checkout has to be on a branch.
    Raises :class:`UserMistake` when something is not ready, :class:`TryAgain` when a remote does not answer (all that
    was done is kept), :class:`ChampionMoved` when the gate's verdict is about a champion that is none any more.
    """
    params = project.parameters(root)
    remote = project.git_remote(root, params)
    to = _Publication(root, params, remote, tell, log or root / LOGS / _name() / "publish.log")
    _check_ready(root, look or Look(dvc.graph(root), dvc.changes(root)))
    gate = read_gate(root)
    measured = read_champion(root / paths.CHAMPION)
    to.patiently(lambda: registry.fetch(root, remote))
    version = version_of(root, (root / "dvc.lock").read_bytes())
    if version is not None:
        own = since is not None and since != version.commit == commit_of(root, "HEAD")
        return _finish(to, version, gate, measured, own)
    if by_hand:
        _check_branch(root, params)
    store = _push_data(to)
    commit = _commit(root)
    name = branch(root) or params.publish.branch
    note = to.patiently(lambda: land(root, commit, name, remote))
    # As late as can be: another machine may be pruning the remote.
    _verify_data(to, commit, store)
    to.patiently(lambda: registry.fetch(root, remote))
    try:
        if gate.passed and params.publish.promote:
            _check_champion(measured, registry.champion(root))
    except ChampionMoved:
        # Makes `evaluate` stale, and nothing else.
        remotely.bring_champion(root, to.log, params.publish.stall_minutes)
        _dvc(to, dvc.add_command(paths.CHAMPION))
        raise
    version = to.patiently(lambda: registry.register(root, commit, gate.message, remote))
    promoted, reasons = _promote(to, version, gate, measured)
    if store is not None:
        pushed.remember(root, store, version)
    return Published(version, True, promoted, tuple(filter(None, [note, *reasons])))


def _finish(to: _Publication, version: Version, gate: Gate, measured: Champion, own: bool) -> Published:
    """Ends what was begun on a version that is registered: its tag may not have been pushed, or it not promoted.

    ``own``: the run that publishes made it.
    """
    root, remote = to.root, to.remote
    told = list(filter(None, [None if own else f"nothing new since {version.name}", _bring(to, version)]))
    if (store := _data_remote(to)) is not None:
        pushed.remember(root, store, version)
    if git(root, "diff", "--name-only", "HEAD", "--", str(paths.SPEED)):
        # What this run took is no version's, and an edited file would be in the way of the next pull.
        git(root, "checkout", "--quiet", "HEAD", "--", str(paths.SPEED), check=False)
        to.tell(f"{paths.SPEED}/ is put back as it is in Git; {paths.MEASUREMENTS}/ has what this run took.")
    version = to.patiently(lambda: registry.register(root, version.commit, version.message, remote))
    if any(event.stage == registry.PRODUCTION and event.commit == version.commit for event in registry.events(root)):
        # Whether it was promoted is settled, though it may have been rolled back since.
        promoted = registry.PRODUCTION in version.stages
        if promoted:
            to.patiently(lambda: registry.promote(root, version, "", remote))
        elif own:
            told.append("another version was put into production since")
        return Published(version, own, own and promoted, tuple(told))
    promoted, reasons = _promote(to, version, gate, measured)
    return Published(version, own, promoted, (*told, *reasons))


def _bring(to: _Publication, version: Version) -> str | None:
    """Brings a version's bytes and its commit to remotes that lack them, as those do that were named after it was made.

    Returns as :func:`flows.land.land` does. Asks for little where nothing is missing: this is what a night without news
    does.
    """
    store = _data_remote(to)
    lacks = store is not None and _lacks(to, version.commit, store)
    note = None
    if lacks:
        _push_data(to)
    if to.remote is not None and not to.patiently(lambda: registry.is_at(to.root, to.remote, version.tag)):
        here = branch(to.root) if is_ancestor(to.root, version.commit, "HEAD") else None
        name = here or to.params.publish.branch
        note = to.patiently(lambda: land(to.root, version.commit, name, to.remote))
    if lacks:
        _verify_data(to, version.commit, store)
    return note


def _promote(to: _Publication, version: Version, gate: Gate, measured: Champion) -> tuple[bool, list[str]]:
    if not gate.passed:
        return False, [check.reason for check in gate.checks if not check.passed] or ["refused by the gate"]
    if not to.params.publish.promote:
        return False, ["params.yaml: publish.promote is false; `overnight promote` puts it into production"]

    before = functools.partial(_check_champion, measured)
    try:
        to.patiently(lambda: registry.promote(to.root, version, f"{PASSED}.", to.remote, before))
    except ChampionMoved:
        # It is a version by now, and measured anew it would be another one of the same model.
        return False, [f"measured against {measured.version or 'no champion'}, which is not the champion"]
    return True, []


def _check_champion(measured: Champion, current: Version | None) -> None:
    if measured.commit == (current.commit if current is not None else None):
        return
    then, now = measured.version or "no champion", current.tag if current is not None else "no champion"
    raise ChampionMoved(
        f"the champion moved from {then} to {now} since this model was measured; `overnight run` measures it again, "
        "then publish."
    )


def _check_branch(root: Path, params: Params) -> None:
    """Raises :class:`UserMistake` where a person's commit would be on no branch that is checked out."""
    if branch(root) is None and worktree.main(root) == root.resolve():
        raise UserMistake(
            f"HEAD is on no branch: the version's commit would go onto '{params.publish.branch}', and leave this "
            "checkout with the next `git switch`. `git switch NAME` first (--create for a new one)."
        )


def _check_ready(root: Path, look: Look) -> None:
    """Raises :class:`UserMistake` when outputs are not up to date, or made by code that is not committed."""
    commit_of(root, "HEAD")
    if stale := [*look.changes.stages, *look.changes.data]:
        raise UserMistake(f"{', '.join(stale)}: not up to date. `overnight run`, then publish (`overnight status`).")
    edited = git(root, "diff", "--name-only", "--relative", "-z", "HEAD", "--", ".").split("\0")
    inputs = {str(path) for stage in look.graph.stages for path in stage.dependencies}
    new = git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *sorted(inputs)).split("\0")
    if found := [path for path in (*edited, *new) if path and not is_pointer(path)]:
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise UserMistake(
            f"{', '.join(found[:_MOST_NAMED])}{more}: not committed, so the version would lack it. `git add` and "
            "`git commit` it, or undo it, then publish."
        )


def _data_remote(to: _Publication) -> str | None:
    with dvc.store(to.root, to.params.publish.data_remote) as store:
        return store.remote


def _push_data(to: _Publication) -> str | None:
    """Pushes what the pointers name; returns the remote's name, None where there is no remote."""
    name = _data_remote(to)
    if name is None:
        to.tell("no DVC remote: the version's bytes are on this machine alone (`dvc remote add --default NAME PLACE`).")
        return None
    to.patiently(lambda: pushed.check(to.root, name, to.log, to.params.publish.stall_minutes))
    to.patiently(lambda: remotely.check(to.root, name, to.log, to.params.publish.stall_minutes))
    to.patiently(lambda: _dvc(to, dvc.push_command(name)))
    return name


def _lacks(to: _Publication, commit: str, store: str) -> bool:
    return to.patiently(lambda: remotely.lacks(to.root, commit, store, to.log, to.params.publish.stall_minutes))


def _verify_data(to: _Publication, commit: str, store: str | None) -> None:
    """Raises :class:`UserMistake` when the remote ``store`` lacks something that the cache has lost."""
    if store is not None:
        to.patiently(lambda: remotely.verify(to.root, commit, store, to.log, to.params.publish.stall_minutes))


def _commit(root: Path) -> str:
    """Commits the pointers as they are now and returns the commit: HEAD, when an earlier attempt has done that."""
    here = environment.record(root)
    environment.write(root, here.model_copy(update={"computed": computed.elsewhere(root, here)}))
    changed = git(root, "diff", "--name-only", "--relative", "-z", "HEAD", "--", ".").split("\0")
    new = git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", ".").split("\0")
    pointers = [path for path in (*changed, *new) if path and is_pointer(path)]
    if pointers:
        git(root, "add", "--all", "--", *pointers, environment=QUIET)
        git(
            root, "commit", "--quiet", "--no-verify", "--message=The data and models of a run", "--", *pointers,
            environment=author(root) | QUIET,
        )  # fmt: skip
    return commit_of(root, "HEAD")


def _dvc(to: _Publication, command: list[str]) -> None:
    """Runs a DVC command.

    Raises :class:`TryAgain` with its complaint, :class:`UserMistake` if there is no room or the remote refuses.
    """

    def on_event(event: Event) -> None:
        if event.notice:
            to.tell(event.notice)

    result = execute.run(to.root, command, to.log, on_event, minutes=to.params.publish.stall_minutes)
    if result.full:
        raise UserMistake(f"DVC: {result.message}")
    if result.refused and "push" in command:
        raise UserMistake(f"DVC: {result.message.rstrip('.')}. {REFUSED}")
    if result.outcome == "failed":
        raise TryAgain(f"DVC: {result.message}")


def _sentence(error: Exception) -> str:
    return f"{str(error).rstrip('.')}."


def _name() -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}-publish"
