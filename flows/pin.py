"""What a night starts from: a worktree that holds what is committed, and the pointers of the last version.

The branch of the nights (``publish.branch``) holds their versions. What people committed meanwhile on the branch that
is checked out in the project, or on the same one at the Git remote, is merged in, as Git merges. What runs write is the
last night's; the text in ``data/raw`` is the last night's with what people added, changed and removed since.
"""

from pathlib import Path

from flows import land, raw, remotely, worktree
from flows.execute import LOGS
from flows.git import GitFailed, author, branch, commit_of, git, is_ancestor
from flows.land import QUIET
from tasks.errors import TryAgain, UserMistake
from tasks.publish_params import PublishParams


class MustMerge(UserMistake):
    """People and nights changed the same lines of one file."""


def worktree_of(project: Path, name: str, publish: PublishParams) -> Path:
    """Returns the worktree ``name`` at the commit that a night starts from; one that is there already, as it is.

    Raises :class:`MustMerge` that names the file, :class:`TryAgain` when the Git remote does not answer.
    """
    base, tip = _base(project, publish.git_remote), _tip(project, publish)
    start = tip or base
    root = worktree.add(project, name, start)
    if not is_ancestor(root, base, "HEAD"):
        _join(root, base, publish)
    return root


def _base(project: Path, remote: str | None) -> str:
    """Returns what people have committed: here, or at the remote where that is further on."""
    here = commit_of(project, "HEAD")
    name = branch(project)
    theirs = _fetch(project, remote, name) if remote is not None and name is not None else None
    return theirs if theirs is not None and is_ancestor(project, here, theirs) else here


def _tip(project: Path, publish: PublishParams) -> str | None:
    """Returns the last commit of the nights' branch, the remote's where it has one."""
    if publish.git_remote is not None and (theirs := _fetch(project, publish.git_remote, publish.branch)):
        return theirs
    reference = f"refs/heads/{publish.branch}"
    return git(project, "rev-parse", "--verify", "--quiet", reference, check=False) or None


def _fetch(project: Path, remote: str, name: str) -> str | None:
    try:
        listed = git(project, "ls-remote", remote, f"refs/heads/{name}").split()
        if not listed:
            return None
        git(project, "fetch", "--quiet", "--no-tags", remote, f"refs/heads/{name}")
    except GitFailed as error:
        raise TryAgain(f"the Git remote '{remote}' cannot be read: {error}") from None
    return listed[0]


def _join(root: Path, base: str, publish: PublishParams) -> None:
    """Merges ``base`` into the worktree's commit."""
    # An earlier attempt may have died in the middle.
    git(root, "reset", "--quiet", "--hard", environment=QUIET)
    land.merge(root, base, land.is_written)
    if raw.is_in_conflict(root):
        remotely.merge_text(root, publish.data_remote, root / LOGS / "merge.log", publish.stall_minutes)
    if conflict := land.conflict(root):
        git(root, "reset", "--quiet", "--hard", environment=QUIET)
        name = publish.branch
        raise MustMerge(
            f"{conflict}: changed both on the branch {name} and in {base[:12]}. Merge by hand (`git switch {name}`, "
            f"`git merge {base[:12]}`), then run this again."
        )
    message = f"Bring what was committed since the last night ({base[:12]})"
    git(
        root, "commit", "--quiet", "--no-verify", "--allow-empty", f"--message={message}",
        environment=author(root) | QUIET,
    )  # fmt: skip
