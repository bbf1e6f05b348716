"""Git worktrees of the project: each holds one commit, shares DVC's cache, and sees nobody's uncommitted edits.

Nothing here prunes: Git takes a worktree whose absolute path it does not see for gone, and in a container that has the
project mounted elsewhere that is each of the others. Ours are locked against whoever else prunes.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from flows import dvc
from flows.git import AS_COMMITTED, GitFailed, git
from tasks import atomic, paths
from tasks.errors import UserMistake

FOLDER = paths.SCRATCH / "worktrees"


def add(project: Path, name: str, commit: str) -> Path:
    """Returns the worktree ``name`` of the project, made at ``commit`` (a detached HEAD) unless it is there already.

    Its ``.overnight`` is its own; DVC's cache and local settings (remotes, credentials) are the project's. Call this
    only while nobody works in it: a lock of Git that lies there is taken for one that a dead command left.
    """
    inside = prefix(project)
    place = project.resolve() / FOLDER / name
    if (place / ".git").is_file() and not _works(place):
        # The project was moved, or is mounted elsewhere than where the worktree was made.
        git(project, "worktree", "repair", str(place), check=False)
    if _works(place):
        Path(git(place, "rev-parse", "--path-format=absolute", "--git-path", "index.lock")).unlink(missing_ok=True)
        return place / inside
    # Half made, or its registration outlived it.
    discard(project, place)
    register(project, place, commit)
    root = place / inside
    if not (root / ".dvc").is_dir():
        raise UserMistake(f"{commit[:12]}: this commit holds no DVC repository (.dvc). Commit it, then run this again.")
    dvc.share_cache(project, root)
    # Last: without it the worktree is made anew.
    atomic.write_text(_ready(place), "")
    return root


def remove(project: Path, name: str) -> None:
    """Removes the worktree ``name`` with all that lies in it; nothing happens when it is not there."""
    place = project.resolve() / FOLDER / name
    _ready(place).unlink(missing_ok=True)
    discard(project, place)


def register(project: Path, place: Path, commit: str, environment: Mapping[str, str] | None = None) -> None:
    """Makes a worktree of Git's at ``place``, where nothing is, which no `git worktree prune` and no `git gc` drops."""
    place.parent.mkdir(parents=True, exist_ok=True)
    # Forced twice: over a registration, locked as ours are, of what is no longer there.
    command = ("worktree", "add", "--quiet", "--force", "--force", "--lock", "--detach", str(place), commit)
    git(project, *command, environment=environment or AS_COMMITTED)


def discard(project: Path, place: Path) -> None:
    """Removes Git's worktree at ``place``, or what is left of it, and its registration; every other one stays."""
    if (place / ".git").is_file():
        # So that Git knows it by this path.
        git(project, "worktree", "repair", str(place), check=False)
    # A half-made one Git does not remove; of one that is gone it forgets the registration.
    shutil.rmtree(place, ignore_errors=True)
    git(project, "worktree", "remove", "--force", "--force", str(place), check=False)


def names(project: Path) -> Iterator[str]:
    """Yields the names of the worktrees that lie under the project's ``.overnight``, in order."""
    for place in sorted((project / FOLDER).glob("*")):
        if place.is_dir():
            yield place.name


@dataclasses.dataclass(frozen=True)
class Listed:
    """A worktree as Git lists it, the project's own checkout among them; ``branch`` is None where a commit is out."""

    place: Path
    head: str
    branch: str | None


def listed(project: Path) -> Iterator[Listed]:
    """Yields every worktree of the project's repository, by whomever it was made."""
    for entry in git(project, "worktree", "list", "--porcelain", "-z").split("\0\0"):
        told = dict(line.partition(" ")[::2] for line in entry.split("\0"))
        if "HEAD" in told:
            yield Listed(Path(told["worktree"]), told["HEAD"], told.get("branch"))


def main(root: Path) -> Path:
    """Returns the project that the worktree at ``root`` belongs to; a project that is no worktree is its own."""
    common = Path(git(root, "rev-parse", "--path-format=absolute", "--git-common-dir"))
    top = Path(git(root, "rev-parse", "--path-format=absolute", "--show-toplevel"))
    if not (top / ".git").is_file() or top.parent.name != FOLDER.name:
        return root.resolve()
    return common.parent / root.resolve().relative_to(top.resolve())


def prefix(project: Path) -> Path:
    """Returns the project's place below the root of its Git repository; ``.`` where it is the root."""
    return Path(git(project, "rev-parse", "--show-prefix") or ".")


def _ready(place: Path) -> Path:
    # Outside the worktree, where no `git clean` in it and no stage can take it away.
    return place.with_name(f".{place.name}.ready")


def _works(place: Path) -> bool:
    if not _ready(place).exists() or not (place / ".git").is_file():
        return False
    try:
        git(place, "rev-parse", "HEAD")
    except GitFailed:
        return False
    return True
