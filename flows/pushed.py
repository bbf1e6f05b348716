"""Where the last version of this machine was pushed to, as ``.overnight/pushed.json`` has it.

DVC makes a folder anew that is gone, and takes a place where nothing is mounted for the remote: what is published then
would be on this machine alone. A place that has nothing of what was pushed to it is not the one that it was.
"""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from flows import dvc, registry, remotely, worktree
from flows.registry import Version
from tasks import atomic, paths
from tasks.errors import TryAgain

FILE = paths.SCRATCH / "pushed.json"


class Pushed(BaseModel):
    """The version that was pushed last, and a digest of the place: an address may hold a password."""

    model_config = ConfigDict(frozen=True)

    place: str
    version: str
    commit: str


def remember(root: Path, remote: str | None, version: Version) -> None:
    """Notes that DVC's ``remote`` has ``version``."""
    with dvc.store(root, remote) as store:
        if store.place is not None:
            note = Pushed(place=_digest(store.place), version=version.name, commit=version.commit)
            atomic.write_json(worktree.main(root) / FILE, note.model_dump())


def check(root: Path, remote: str, log: Path, minutes: float) -> None:
    """Raises :class:`TryAgain` where ``remote`` has nothing of the version that was pushed there last, or is silent."""
    try:
        last = Pushed.model_validate_json((worktree.main(root) / FILE).read_bytes())
    except (OSError, ValidationError):
        return
    with dvc.store(root, remote) as store:
        same = store.place is not None and _digest(store.place) == last.place
    known = any(version.commit == last.commit for version in registry.versions(root))
    if same and known and remotely.has_nothing(root, last.commit, remote, log, minutes):
        raise TryAgain(
            f"DVC's remote '{remote}' has nothing of {last.version}, which was pushed to that very place: look whether "
            f"it is mounted, and the right one. `overnight push {last.version}` brings it there anew; without {FILE} "
            "nobody asks."
        )


def _digest(place: str) -> str:
    return hashlib.sha256(place.encode()).hexdigest()
