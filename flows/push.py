"""``overnight push``: versions at the remotes that lack them, as those do that were named after they were made.

DVC's own ``push --all-tags`` reads each tag's settings, which know no remote that was named later, and passes it over.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from flows import contents, dvc, objects, project, pushed, registry, remotely, restore
from flows.execute import LOGS
from flows.git import Declined, GitFailed, branch, commit_of, git, is_ancestor
from flows.registry import Version
from flows.terminal import print_line
from tasks.errors import TryAgain, UserMistake
from tasks.progress import sink_for

EXIT_LOST = 1
LOG = LOGS / "push.log"


def push(names: Sequence[str], out: Console, err: Console, verify: bool = False) -> int:
    """Brings the versions ``names``, or all, to DVC's and Git's remotes; says of each where it is.

    ``verify`` reads back what DVC's remote has of them, once, and mends what is damaged there from the cache.

    Returns the exit code: 0, or 1 when bytes of one are neither at DVC's remote nor here, or Git's declines its tag;
    the others are brought all the same. Raises :class:`UserMistake` for an unknown version, where there is no remote
    and where DVC's refuses, :class:`TryAgain` when one does not answer.
    """
    root = project.find()
    git_remote, store = fetched(root), data_remote(root)
    if places := [place for place in (store, git_remote) if place is not None]:
        versions = [registry.resolve(root, name) for name in names] or registry.versions(root)
    else:
        raise UserMistake(
            "there is no remote to push to: `dvc remote add --default NAME PLACE` names one for data and models, "
            "publish.git_remote in params.yaml one for Git."
        )
    if verify and store is None:
        raise UserMistake("--verify: no DVC remote is configured (`dvc remote list`). Leave the option out.")
    if not versions:
        print_line(err, "no version yet; `overnight publish` makes the first of what the last run made.")
    brought: list[Version] = []
    with tempfile.TemporaryDirectory() as scratch:
        for version in versions:
            try:
                bring_data(root, version, store)
                if verify and store is not None:
                    _read_back(root, version, store, Path(scratch) / "seen", err)
                bring_tag(root, version, git_remote)
            except (remotely.Lost, Declined) as error:
                print_line(err, f"error: {error}")
            else:
                brought.append(version)
                print_line(out, f"{version.name} is at {' and '.join(places)}.")
    if brought and store is not None:
        pushed.remember(root, store, brought[-1])
    if git_remote is not None:
        with _answering(git_remote):
            registry.push_assignments(root, git_remote, brought)
            if (name := branch(root)) and not is_at_remote(root, git_remote, name):
                told = f"{git_remote} lacks commits of your branch {name}, and with them what a clone knows of remotes"
                told += ": `git push` brings them."
                print_line(err, told)
    return EXIT_LOST if len(brought) < len(versions) else 0


def fetched(root: Path) -> str | None:
    """Returns the name of Git's remote for versions, whose tags are here now; None where there is none.

    Raises :class:`UserMistake` when Git knows none of that name, :class:`TryAgain` when it does not answer.
    """
    remote = project.git_remote(root, project.parameters(root))
    with _answering(remote):
        registry.fetch(root, remote)
    return remote


def data_remote(root: Path) -> str | None:
    """Returns the name of DVC's remote for versions; None where there is none."""
    with dvc.store(root, project.parameters(root).publish.data_remote) as store:
        return store.remote


def bring_data(root: Path, version: Version, store: str | None) -> None:
    """Uploads what DVC's remote ``store`` lacks of ``version``; None: there is none, and the cache has to have it all.

    Raises :class:`flows.remotely.Lost` for bytes that the cache lacks too, :class:`UserMistake` when the remote
    refuses, :class:`TryAgain` when it does not answer.
    """
    try:
        contents.recorded(root, version.commit)
    except UserMistake as error:
        raise remotely.Lost(f"{version.name}: {error}") from None
    if store is None:
        _check_cached(root, version)
        return
    minutes = project.parameters(root).publish.stall_minutes
    try:
        remotely.verify(root, version.commit, store, root / LOG, minutes)
    except remotely.Lost as error:
        raise _lost(version, error, "overnight push") from None


def _read_back(root: Path, version: Version, store: str, seen: Path, err: Console) -> None:
    minutes, sink = project.parameters(root).publish.stall_minutes, sink_for(err)
    try:
        remotely.read_back(root, version.commit, store, seen, root / LOG, minutes, sink.show)
    except remotely.Lost as error:
        raise _lost(version, error, restore.VERIFY) from None
    finally:
        sink.close()


def _lost(version: Version, error: remotely.Lost, command: str) -> remotely.Lost:
    return remotely.Lost(
        f"{version.name}: {str(error).split('. ')[0].rstrip('.')}. `{command} {version.name}` on a machine "
        f"that has them brings them; `overnight rebuild {version.name}` computes those of the stages anew."
    )


def _check_cached(root: Path, version: Version) -> None:
    with dvc.store(root) as store:
        found, lost = objects.findable(store, contents.recorded(root, version.commit), {})
        missing = [md5 for md5 in found if not store.path(md5).is_file()]
    if lost or missing:
        raise remotely.Lost(
            f"{version.name}: its bytes are not in DVC's cache, and there is no remote of DVC's to have them from. "
            "`git pull` where others have named one, or `dvc remote add --default NAME PLACE`."
        )


def bring_tag(root: Path, version: Version, remote: str | None) -> None:
    """Pushes the tag of ``version``, and so its commit, where Git's ``remote`` lacks it. Raises as :func:`fetched`."""
    with _answering(remote):
        if remote is not None and not registry.is_at(root, remote, version.tag):
            registry.register(root, version.commit, version.message, remote)


def is_at_remote(root: Path, remote: str, name: str) -> bool:
    """Whether ``remote`` has all commits of the branch ``name``, which is checked out, where that is pushed to."""
    follows = git(root, "config", f"branch.{name}.remote", check=False) == remote
    reference = (git(root, "config", f"branch.{name}.merge", check=False) if follows else "") or f"refs/heads/{name}"
    if not git(root, "ls-remote", remote, reference):
        return False
    git(root, "fetch", "--quiet", "--no-tags", remote, reference)
    return is_ancestor(root, commit_of(root, "HEAD"), commit_of(root, "FETCH_HEAD"))


@contextlib.contextmanager
def _answering(remote: str | None) -> Iterator[None]:
    try:
        yield
    except Declined:
        raise
    except GitFailed as error:
        raise TryAgain(f"the Git remote '{remote}', which decides, does not answer: {error}") from None
