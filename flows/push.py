"""``overnight push``: versions at the remotes that lack them, as those do that were named after they were made.

DVC's own ``push --all-tags`` reads each tag's settings, which know no remote that was named later, and passes it over.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from flows import dvc, project, registry, remotely
from flows.execute import LOGS
from flows.git import GitFailed
from flows.registry import Version
from tasks.errors import TryAgain, UserMistake

EXIT_LOST = 1
_LOG = LOGS / "push.log"


def push(names: Sequence[str], out: Console, err: Console) -> int:
    """Brings the versions ``names``, or all, to DVC's and Git's remotes; says of each where it is.

    Returns the exit code: 0, or 1 when bytes of one are neither at DVC's remote nor here. Raises :class:`UserMistake`
    for an unknown version and where there is no remote, :class:`TryAgain` when one does not answer.
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
    brought: list[Version] = []
    for version in versions:
        try:
            bring_data(root, version, store)
            bring_tag(root, version, git_remote)
        except UserMistake as error:
            err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        else:
            brought.append(version)
            out.print(f"{version.name} is at {' and '.join(places)}.", markup=False, highlight=False, soft_wrap=True)
    if git_remote is not None:
        with _answering(git_remote):
            registry.push_assignments(root, git_remote, brought)
    return EXIT_LOST if len(brought) < len(versions) else 0


def fetched(root: Path) -> str | None:
    """Returns the name of Git's remote for versions, whose tags are here now; None where there is none.

    Raises :class:`TryAgain` when it does not answer.
    """
    remote = project.parameters(root).publish.git_remote
    with _answering(remote):
        registry.fetch(root, remote)
    return remote


def data_remote(root: Path) -> str | None:
    """Returns the name of DVC's remote for versions; None where there is none."""
    with dvc.store(root, project.parameters(root).publish.data_remote) as store:
        return store.remote


def bring_data(root: Path, version: Version, store: str | None) -> None:
    """Uploads what DVC's remote ``store`` lacks of ``version``.

    Raises :class:`UserMistake` for bytes that the cache lacks too, :class:`TryAgain` when the remote does not answer.
    """
    if store is None:
        return
    minutes = project.parameters(root).publish.stall_minutes
    try:
        remotely.verify(root, version.commit, store, root / _LOG, minutes)
    except UserMistake as error:
        raise UserMistake(
            f"{version.name}: {str(error).split('. ')[0].rstrip('.')}. `overnight push {version.name}` on a machine "
            f"that has them brings them; `overnight rebuild {version.name}` makes them again."
        ) from None


def bring_tag(root: Path, version: Version, remote: str | None) -> None:
    """Pushes the tag of ``version``, and so its commit, where Git's ``remote`` lacks it. Raises as :func:`fetched`."""
    with _answering(remote):
        if remote is not None and not registry.is_at(root, remote, version.tag):
            registry.register(root, version.commit, version.message, remote)


@contextlib.contextmanager
def _answering(remote: str | None) -> Iterator[None]:
    try:
        yield
    except GitFailed as error:
        raise TryAgain(f"the Git remote '{remote}', which decides, does not answer: {error}") from None
