"""``overnight promote`` and ``overnight rollback``: which version is in production. Nothing is rebuilt.

What a remote lacks of the version is brought there first: else what is in production could not be had anywhere else.
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flows import project, push, pushed, registry, remotely
from flows.gate import REFUSED
from flows.registry import Version
from tasks.errors import TryAgain, UserMistake


def promote(text: str, out: Console, err: Console) -> int:
    """Puts the version that ``text`` names into production and returns the exit code, 0.

    A person may promote what the gate refused; that is told. Raises :class:`UserMistake` for an unknown version and one
    whose bytes are lost, :class:`TryAgain` when a remote does not answer.
    """
    root = project.find()
    remote = push.fetched(root)
    version = registry.resolve(root, text)
    verdict = version.message.split("\n")[0].rstrip(".")
    if verdict.startswith(REFUSED):
        err.print(escape(f"{version.name}: {verdict}. It is promoted because you ask for it."), soft_wrap=True)
    if (store := push.data_remote(root)) is not None:
        minutes = project.parameters(root).publish.stall_minutes
        pushed.check(root, store, root / push.LOG, minutes)
    push.bring_data(root, version, store)
    _assign(root, version, "Promoted by hand.", remote, out)
    return 0


def rollback(out: Console, err: Console) -> int:
    """Puts the version that was in production before the present one back there; again, the one before that.

    Returns the exit code, 0. Raises :class:`UserMistake` when there was none, :class:`TryAgain` when Git's remote does
    not answer. That DVC's does not, or that bytes are lost, is told, and no reason to wait.
    """
    root = project.find()
    remote = push.fetched(root)
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
    # Production changes at once, whatever has become of the bytes; it was there before.
    try:
        push.bring_data(root, before, push.data_remote(root))
    except remotely.Lost as error:
        err.print(escape(str(error)), soft_wrap=True)
    except (TryAgain, UserMistake) as error:
        told = f"{error} Whether all of {before.name} is there was not asked; `overnight push {before.name}` does."
        err.print(escape(told), soft_wrap=True)
    return 0


def _assign(root: Path, version: Version, message: str, remote: str | None, out: Console) -> None:
    push.bring_tag(root, version, remote)
    made = registry.promote(root, version, message, remote)
    where = f"at {remote} too" if remote is not None else "on this machine (params.yaml: publish.git_remote is null)"
    told = f"{version.name} is in production, {where}." if made else f"{version.name} is in production already."
    out.print(escape(told), soft_wrap=True)
