"""Versions of the model and which one is in production, as annotated Git tags in the grammar of GTO.

``lm@v1.2.0`` registers a commit as a version, ``lm#prod#7`` assigns it the stage ``prod``; the newest assignment
names the champion. ``lm@v1.2.0!#8`` and ``lm#prod!#9``, which `gto deprecate` writes, take either back. Where several
machines share a Git remote it decides: a tag that it refuses has been taken by another machine.
"""

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from flows.git import Declined, GitFailed, author, git
from tasks.errors import UserMistake

ARTIFACT = "lm"
PRODUCTION = "prod"
LATEST = "latest"
# How the message of a promotion begins that goes back in the line instead of adding to it.
ROLLED_BACK = "Rolled back from"
_ATTEMPTS = 8
_MOST_NAMED = 5

_TAG = re.compile(
    rf"{ARTIFACT}(?:@(?P<version>v\d+\.\d+\.\d+)|#(?P<stage>[A-Za-z0-9_-]+))(?P<cancels>!?)(?:#(?P<count>\d+))?"
)
# One record a tag. What a lightweight tag points to is a commit itself: GTO leaves those aside, and so do we.
_FORMAT = "%(refname:strip=2)%00%(objecttype)%00%(*objectname)%00%(taggerdate:unix)%00%(contents)%00%01"


@dataclasses.dataclass(frozen=True)
class Version:
    """A registered version: ``name`` is ``v1.2.0``, ``tag`` ``lm@v1.2.0``, ``message`` that of the tag."""

    name: str
    tag: str
    commit: str
    at: datetime
    stages: tuple[str, ...]
    message: str

    @property
    def number(self) -> tuple[int, ...]:
        """The parts of the name, which order versions."""
        return _number(self.name)


@dataclasses.dataclass(frozen=True)
class Event:
    """One tag of the registry. Either ``version`` or ``stage`` is given; ``cancels`` takes an earlier one back."""

    tag: str
    version: str | None
    stage: str | None
    cancels: bool
    count: int
    commit: str
    at: int
    message: str


class NoSuchVersion(UserMistake):
    """No version has this name. The message names those that there are."""


def versions(root: Path) -> tuple[Version, ...]:
    """Returns all registered versions, the newest last."""
    return read(events(root))


def champion(root: Path) -> Version | None:
    """Returns the version in production, or None when none was ever promoted."""
    return next((version for version in versions(root) if PRODUCTION in version.stages), None)


def resolve(root: Path, text: str) -> Version:
    """Returns the version that ``text`` names: ``v1.2.0``, ``lm@v1.2.0``, ``latest`` or ``prod``.

    Raises :class:`NoSuchVersion`.
    """
    known = versions(root)
    wanted = text.removeprefix(f"{ARTIFACT}@")
    for version in reversed(known):
        if wanted in (version.name, LATEST, *version.stages):
            return version
    names = [version.name for version in known[-_MOST_NAMED:]]
    if not names:
        raise NoSuchVersion(f"there is no version '{text}', nor any other yet. `overnight publish` makes the first.")
    if wanted == PRODUCTION:
        raise NoSuchVersion(f"no version is in production yet. `overnight promote {names[-1]}` would make it so.")
    more = f" and {len(known) - len(names)} older ones" if len(known) > len(names) else ""
    raise NoSuchVersion(f"there is no version '{text}'; there are {', '.join(names)}{more} (`overnight versions`).")


def resolve_with(root: Path, text: str, remote: str | None, say: Callable[[str], object]) -> Version:
    """Returns what :func:`resolve` does, of the versions at ``remote`` too; ``say`` is told if it does not answer."""
    fetch_if_it_answers(root, remote, say)
    return resolve(root, text)


def fetch_if_it_answers(root: Path, remote: str | None, say: Callable[[str], object]) -> None:
    """Does what :func:`fetch` does; that ``remote`` does not answer, or is none, ``say`` is told."""
    try:
        fetch(root, remote, say)
    except UserMistake as error:
        say(f"{str(error).rstrip('.')}. What is known here is taken.")


def check_remote(root: Path, remote: str | None) -> None:
    """Raises :class:`UserMistake` where Git has no remote of the name ``remote``, which is that of ``params.yaml``."""
    if remote is None or remote in (known := git(root, "remote").split()):
        return
    there = f"there are {', '.join(known)}" if known else "there is none"
    raise UserMistake(f"params.yaml: publish.git_remote: Git has no remote '{remote}'; {there} (`git remote add`).")


def register(root: Path, commit: str, message: str, remote: str | None = None) -> Version:
    """Returns ``commit``'s version, registered under the next free number unless it is one already.

    With ``remote`` the tag is pushed there. Raises :class:`flows.git.GitFailed` when that fails, and takes the tag
    back. After a crash the next call goes on with the same number or, where another machine took that, with another.
    """
    with _taken_back_if_it_fails(root) as made:
        for _ in range(_ATTEMPTS):
            fetch(root, remote, own=made)
            known = events(root)
            tag = next((one.tag for one in read(known) if one.commit == commit), None)
            try:
                if tag is None:
                    tag = f"{ARTIFACT}@{following(known)}"
                    made[tag] = _tag(root, tag, commit, message, known)
                _push(root, remote, tag)
            except Declined:
                raise
            except GitFailed as error:
                failure = error
                continue
            # Another process of this clone may have fetched the remote's tag over ours in between.
            for version in versions(root):
                if version.commit == commit:
                    return version
        raise failure


def promote(
    root: Path,
    version: Version,
    message: str,
    remote: str | None = None,
    before: Callable[[Version | None], object] = lambda champion: None,
) -> bool:
    """Puts ``version`` into production; returns False when it was there already.

    ``before`` is called with the champion that is to be replaced, as the remote knows it now, and may raise to stop.
    Two machines that promote at once take the same number, so that the later one sees the other's champion first.
    Raises as :func:`register` does.
    """
    with _taken_back_if_it_fails(root) as made:
        for _ in range(_ATTEMPTS):
            fetch(root, remote)
            known = events(root)
            current = next((one for one in read(known) if PRODUCTION in one.stages), None)
            try:
                if current is not None and current.commit == version.commit:
                    tag = max((one for one in known if one.stage == PRODUCTION and not one.cancels), key=_order).tag
                else:
                    before(current)
                    tag = f"{ARTIFACT}#{PRODUCTION}#{max((one.count for one in known), default=0) + 1}"
                    made[tag] = _tag(root, tag, version.commit, message, known)
                _push(root, remote, tag)
            except Declined:
                raise
            except GitFailed as error:
                failure = error
                continue
            now = champion(root)
            if now is not None and now.commit == version.commit:
                return bool(made)
        raise failure


@contextlib.contextmanager
def _taken_back_if_it_fails(root: Path) -> Iterator[dict[str, str]]:
    """Yields what holds the tags that are made within, with their hashes.

    When a Git command fails they go again, lest they hold on this machine alone. One that the remote has all the same
    comes back with the next fetch.
    """
    made: dict[str, str] = {}
    try:
        yield made
    except GitFailed:
        for tag, own in made.items():
            # Nothing happens where the remote's tag has taken the place of ours.
            git(root, "update-ref", "-d", f"refs/tags/{tag}", own, check=False)
        raise


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fetch(root: Path, remote: str | None, say: Callable[[str], object] = _on_stderr, own: Collection[str] = ()) -> None:
    """Brings the registry's tags from ``remote``; where it has another tag of the same name, that takes ours' place.

    ``say`` is told which versions are another commit by that, but of ``own``, which the caller has only just made.
    Raises :class:`UserMistake` where Git knows no such remote, :class:`flows.git.GitFailed` when it does not answer.
    """
    if remote is not None:
        spaces = (f"+refs/tags/{ARTIFACT}{mark}*:refs/tags/{ARTIFACT}{mark}*" for mark in "@#")
        try:
            with moves_told(root, remote, say, own):
                git(root, "fetch", "--quiet", "--no-tags", remote, *spaces)
        except GitFailed:
            # Git takes a name that it does not know for a folder, and says so.
            check_remote(root, remote)
            raise


@contextlib.contextmanager
def moves_told(
    root: Path, remote: str, say: Callable[[str], object] = _on_stderr, own: Collection[str] = ()
) -> Iterator[None]:
    """Tells ``say``, as :func:`fetch` does, which versions are another commit after what is fetched within."""
    before = _commits(root)
    yield
    after = _commits(root)
    moved = [
        f"{tag} from {commit[:12]} to {after[tag][:12]}"
        for tag, commit in before.items()
        if tag not in own and after.get(tag, commit) != commit
    ]
    if moved:
        say(f"the Git remote '{remote}', which decides, has moved versions that were known here: {', '.join(moved)}.")


def _commits(root: Path) -> dict[str, str]:
    # Of a lightweight tag the second field is empty.
    listed = git(
        root, "for-each-ref", "--format=%(refname:strip=2) %(*objectname) %(objectname)", f"refs/tags/{ARTIFACT}@*"
    )
    found = dict(line.split()[:2] for line in listed.splitlines())
    return {tag: commit for tag, commit in found.items() if "!" not in tag}


def is_at(root: Path, remote: str | None, tag: str) -> bool:
    """Whether ``remote`` has ``tag``; without a remote nothing is anywhere else."""
    return remote is not None and bool(git(root, "ls-remote", remote, f"refs/tags/{tag}"))


def push_assignments(root: Path, remote: str, versions: Collection[Version]) -> None:
    """Pushes what put ``versions`` into production, and took them out, where ``remote`` lacks it."""
    listed = git(root, "ls-remote", remote, f"refs/tags/{ARTIFACT}#*").splitlines()
    there = {line.partition("refs/tags/")[2].removesuffix("^{}") for line in listed}
    commits = {version.commit for version in versions}
    tags = [event.tag for event in events(root) if event.stage and event.commit in commits and event.tag not in there]
    if tags:
        git(root, "push", "--quiet", "--no-verify", remote, *(f"refs/tags/{tag}" for tag in tags))


def events(root: Path) -> tuple[Event, ...]:
    """Returns the tags of the registry, oldest first."""
    listed = git(root, "for-each-ref", f"--format={_FORMAT}", *(f"refs/tags/{ARTIFACT}{mark}*" for mark in "@#"))
    found = []
    for record in listed.split("\0\1"):
        if not record.strip():
            continue
        tag, kind, commit, at, message = record.lstrip("\n").split("\0", 4)
        parts = _TAG.fullmatch(tag)
        if parts and kind == "tag":
            found.append(
                Event(
                    tag=tag, version=parts["version"], stage=parts["stage"], cancels=bool(parts["cancels"]),
                    count=int(parts["count"] or 0), commit=commit, at=int(at), message=message.strip(),
                )
            )  # fmt: skip
    return tuple(sorted(found, key=_order))


def read(events: Sequence[Event]) -> tuple[Version, ...]:
    """Returns the versions that ``events``, in order, leave registered, the newest last. A pure function."""
    registered: dict[str, Event] = {}
    for event in events:
        if event.version is not None:
            if event.cancels:
                registered.pop(event.version, None)
            else:
                registered[event.version] = event
    holders = {one.stage: _holder(events, one.stage) for one in events if one.stage is not None}
    found = [
        Version(
            name=name,
            tag=event.tag,
            commit=event.commit,
            at=datetime.fromtimestamp(event.at, UTC),
            stages=tuple(sorted(stage for stage, commit in holders.items() if commit == event.commit)),
            message=event.message,
        )
        for name, event in registered.items()
    ]
    return tuple(sorted(found, key=lambda version: version.number))


def history(events: Sequence[Event]) -> tuple[str, ...]:
    """Returns the commits that were in production and can be gone back to, the present one last. A pure function.

    A rollback goes back to the commit's place, so that two of them go back twice; any other assignment adds to it.
    """
    line: list[str] = []
    for event in events:
        if event.stage != PRODUCTION:
            continue
        if event.cancels:
            line = [commit for commit in line if commit != event.commit]
        elif event.commit in line and event.message.startswith(ROLLED_BACK):
            while line[-1] != event.commit:
                line.pop()
        elif line[-1:] != [event.commit]:
            line.append(event.commit)
    return tuple(line)


def _holder(events: Sequence[Event], stage: str) -> str | None:
    # As GTO has it: the commit assigned last among those from which the stage was not taken away again.
    holding: dict[str, None] = {}
    for event in events:
        if event.stage == stage:
            holding.pop(event.commit, None)
            if not event.cancels:
                holding[event.commit] = None
    return next(reversed(holding), None)


def following(events: Sequence[Event]) -> str:
    """Returns the name of the next version: one minor number above the highest that was ever given."""
    given = [_number(event.version) for event in events if event.version is not None]
    if not given:
        return "v1.0.0"
    major, minor, _ = max(given)
    return f"v{major}.{minor + 1}.0"


def _number(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.removeprefix("v").split("."))


def _order(event: Event) -> tuple[int, int, int]:
    # GTO orders by time alone. Of one second, what was registered comes before what was assigned.
    return (event.at, event.stage is not None, event.count)


def _tag(root: Path, tag: str, commit: str, message: str, known: Sequence[Event]) -> str:
    # Later than every tag before it, though another machine's clock may be ahead: GTO orders by these dates.
    at = max([int(time.time()), *(event.at + 1 for event in known)])
    environment = {**author(root), "GIT_COMMITTER_DATE": f"{at} +0000"}
    git(root, "tag", "--annotate", "--cleanup=verbatim", f"--message={message}\n", tag, commit, environment=environment)
    return git(root, "rev-parse", f"refs/tags/{tag}")


def _push(root: Path, remote: str | None, tag: str) -> None:
    if remote is not None:
        git(root, "push", "--quiet", "--no-verify", remote, f"refs/tags/{tag}")
