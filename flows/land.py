"""Puts a commit on a branch, here and at a Git remote, and loses nothing that others put there meanwhile.

Nobody's checkout is touched: branches only move forward, and where histories have to be joined, that happens in a
worktree of its own. What a run has written is ours then; anything else is merged as Git merges it.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from flows import raw, worktree
from flows.git import Declined, GitFailed, author, branch, git, is_ancestor
from tasks import paths

# Hooks that `dvc install` makes would check data out, or push it once more.
QUIET = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.hooksPath", "GIT_CONFIG_VALUE_0": os.devnull}
SCRATCH = "merge-"
_ATTEMPTS = 8


class _Conflict(Exception):
    """Two commits changed the same lines of files that are no pointers."""


def is_pointer(path: str) -> bool:
    """Whether DVC or we, and not people, write this file of a version."""
    return is_written(path) or Path(path).name == ".gitignore" or Path(path).suffix == ".dvc"


def is_written(path: str) -> bool:
    """Whether runs write this file of a version, all of it: what people did to it is then no edit to keep."""
    if Path(path).parent == paths.SPEED:
        return Path(path).suffix == ".csv"
    return path in ("dvc.lock", "environment.json", f"{paths.CHAMPION}.dvc", f"{paths.INIT}.dvc")


def land(root: Path, commit: str, name: str, remote: str | None) -> str | None:
    """Makes ``commit`` part of the branch ``name`` here and at ``remote``.

    Returns None, or in one line why it is not part of one of the two; what it holds is not lost then, as long as a tag
    names it. Raises :class:`flows.git.GitFailed` when the remote cannot be reached or refuses without a cause, its kind
    :class:`flows.git.Declined` at once.
    """
    reference = f"refs/heads/{name}"
    for _ in range(_ATTEMPTS):
        theirs = _tip_at(root, remote, reference)
        ours = git(root, "rev-parse", "--verify", "--quiet", reference, check=False) or None
        tip = commit
        try:
            for other in filter(None, (theirs, ours)):
                tip = _join(root, tip, other, name)
        except _Conflict as error:
            return f"not on the branch {name}, where {error} changed too; merge {commit[:12]} there by hand"
        try:
            if remote is not None and tip != theirs:
                git(root, "push", "--quiet", "--no-verify", remote, f"{tip}:{reference}", environment=QUIET)
            return _move(root, name, reference, tip, ours)
        except Declined:
            raise
        except GitFailed as error:
            # Somebody was quicker: look again.
            failure = error
    raise failure


def _tip_at(root: Path, remote: str | None, reference: str) -> str | None:
    if remote is None:
        return None
    listed = git(root, "ls-remote", remote, reference).split()
    if not listed:
        return None
    git(root, "fetch", "--quiet", "--no-tags", remote, reference)
    return listed[0]


def _join(root: Path, commit: str, other: str, name: str) -> str:
    """Returns a commit that holds both: the later one, or a merge."""
    if is_ancestor(root, other, commit):
        return commit
    if is_ancestor(root, commit, other):
        return other
    with _scratch(root, commit) as place:
        # The branch's end is to hold the text that the version was made from.
        merge(place, other, lambda path: is_written(path) or Path(path) == raw.POINTER)
        if found := conflict(place):
            raise _Conflict(found)
        git(
            place, "commit", "--quiet", "--no-verify", f"--message=Join the versions of {name}",
            environment=author(root) | QUIET,
        )  # fmt: skip
        return git(place, "rev-parse", "HEAD")


def merge(root: Path, other: str, ours: Callable[[str], bool]) -> None:
    """Merges ``other`` into the worktree at ``root``, without a commit; conflicts may stay.

    Files of which ``ours`` is true stay as they are; a ``.gitignore`` that both changed gets the lines of both.
    """
    git(root, "merge", "--quiet", "--no-commit", "--no-ff", other, check=False, environment=author(root) | QUIET)
    held = git(root, "ls-tree", "-r", "--name-only", "-z", "HEAD", ".").split("\0")
    if kept := [path for path in held if ours(path)]:
        git(root, "checkout", "HEAD", "--", *kept, environment=QUIET)
    for path in git(root, "diff", "--name-only", "--relative", "--diff-filter=U", "-z").split("\0"):
        if Path(path).name == ".gitignore":
            sides = (git(root, "show", f":{side}:./{path}", check=False).splitlines() for side in (2, 3))
            lines = dict.fromkeys(itertools.chain(*sides))
            (root / path).write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")
            git(root, "add", "--", path, environment=QUIET)


def conflict(root: Path) -> str | None:
    """Returns the first file that waits for somebody to merge it, None where none does."""
    return git(root, "diff", "--name-only", "--diff-filter=U").split("\n")[0] or None


@contextlib.contextmanager
def _scratch(root: Path, commit: str) -> Iterator[Path]:
    """Yields the project in a worktree at ``commit``, without data, for a moment."""
    place = root.resolve() / paths.SCRATCH / f"{SCRATCH}{os.getpid()}"
    worktree.register(root, place, commit, QUIET)
    try:
        yield place / worktree.prefix(root)
    finally:
        worktree.discard(root, place)


def _move(root: Path, name: str, reference: str, tip: str, old: str | None) -> str | None:
    if tip == old:
        return None
    for one in worktree.listed(root):
        if one.branch == reference:
            who = "here" if branch(root) == name else f"in {one.place}"
            return f"the branch {name} is checked out {who} and stays where it is; `git merge {tip[:12]}` brings it on"
    git(root, "update-ref", reference, tip, old or "")
    return None
