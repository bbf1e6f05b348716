"""``overnight promote`` and ``overnight rollback``: which version is in production. Nothing is rebuilt or moved."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flows import project, registry
from flows.git import GitFailed
from flows.registry import Version
from tasks.errors import TryAgain, UserMistake

REFUSED = "Refused"


def promote(text: str, out: Console, err: Console) -> int:
    """Puts the version that ``text`` names into production and returns the exit code, 0.

    A person may promote what the gate refused; that is told. Raises :class:`UserMistake` for an unknown version,
    :class:`TryAgain` when the Git remote does not answer.
    """
    root = project.find()
    remote = _fetched(root)
    version = registry.resolve(root, text)
    verdict = version.message.split("\n")[0].rstrip(".")
    if verdict.startswith(REFUSED):
        err.print(escape(f"{version.name}: {verdict}. It is promoted because you ask for it."), soft_wrap=True)
    _assign(root, version, "Promoted by hand.", remote, out)
    return 0


def rollback(out: Console) -> int:
    """Puts the version that was in production before the present one back there; again, the one before that.

    Returns the exit code, 0. Raises :class:`UserMistake` when there was none, :class:`TryAgain` as :func:`promote`.
    """
    root = project.find()
    remote = _fetched(root)
    known = {version.commit: version for version in registry.versions(root)}
    line = [known[commit] for commit in registry.history(registry.events(root)) if commit in known]
    if not line:
        raise UserMistake("no version is in production, so none can be rolled back. `overnight versions` lists them.")
    now = line[-1]
    before = next((version for version in reversed(line) if version != now), None)
    if before is None:
        raise UserMistake(
            f"{now.name} is the first version that was in production; there is none before it. `overnight promote` "
            "takes any version."
        )
    _assign(root, before, f"{registry.ROLLED_BACK} {now.name}.", remote, out)
    return 0


def _fetched(root: Path) -> str | None:
    remote = project.parameters(root).publish.git_remote
    try:
        registry.fetch(root, remote)
    except GitFailed as error:
        raise TryAgain(f"the Git remote '{remote}', which decides, does not answer: {error}") from None
    return remote


def _assign(root: Path, version: Version, message: str, remote: str | None, out: Console) -> None:
    if remote is not None and not registry.is_at(root, remote, version.tag):
        raise UserMistake(
            f"{version.name} is not at {remote}: it was made before that was named, or not published to the end. "
            f"`dvc push --all-tags` and `git push {remote} {version.tag}` bring it there; then run this again."
        )
    made = registry.promote(root, version, message, remote)
    where = f"at {remote} too" if remote is not None else "on this machine (params.yaml: publish.git_remote is null)"
    told = f"{version.name} is in production, {where}." if made else f"{version.name} is in production already."
    out.print(escape(told), soft_wrap=True)
