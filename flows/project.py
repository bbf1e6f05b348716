"""The checks before anything runs: is this a project, with Git, DVC, and parameters that fit?"""

from pathlib import Path

from flows import registry
from flows.git import show
from tasks import paths
from tasks.errors import BadParameter, UserMistake
from tasks.notice_params import NoticeParams
from tasks.params import Params, parse, read

DAG = Path("dvc.yaml")
# In a folder that a version was restored to: which commit it holds.
RESTORED = paths.SCRATCH / "restored"


class NotAProject(UserMistake):
    """The current folder is not the root of a project, or the project lacks Git or DVC."""


def find() -> Path:
    """Returns the project's folder, the current one. Raises :class:`NotAProject` when something is missing."""
    root = Path.cwd()
    if (root / RESTORED).is_file() and not (root / ".git").exists():
        raise NotAProject(
            f"{root}: a restored version, and no project: its files are for use as they are. In the project, "
            "`generate`, `chat` and `serve` take it with --version."
        )
    missing = [name for name in (DAG, paths.PARAMS) if not (root / name).is_file()]
    if len(missing) == 1:
        told = f"`git checkout {missing[0]}` brings back the one that was committed"
        raise NotAProject(f"{root}: a project without its {missing[0]}. {told}.")
    if missing:
        raise NotAProject(f"{root}: no {missing[0]} here. Change to the project's folder and run this again.")
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        raise NotAProject(f"{root}: not in a Git repository. Run `git init`, or clone the project with Git.")
    if not (root / ".dvc").is_dir():
        raise NotAProject(f"{root}: no DVC repository here. Run `dvc init` (with --subdir below the Git root).")
    scratch = root / paths.SCRATCH
    if not scratch.is_dir() and (scratch.exists() or scratch.is_symlink()):
        what = (
            f"a link to {scratch.readlink()}, which is not there. Mount" if scratch.is_symlink() else "a file. Remove"
        )
        raise NotAProject(f"{scratch}: {what} it: runs keep their records and logs in a folder of this name.")
    return root


def parameters(root: Path) -> Params:
    """Returns ``params.yaml``, whole. Raises :class:`tasks.errors.BadParameter` that names every wrong key."""
    return read(root / paths.PARAMS)


def git_remote(root: Path, params: Params) -> str | None:
    """Returns the name of Git's remote for versions, None where none is asked for. Raises :class:`UserMistake`."""
    registry.check_remote(root, params.publish.git_remote)
    return params.publish.git_remote


def committed(root: Path) -> Params:
    """Returns ``params.yaml`` as it was last committed: edits in the checkout are no concern of a night.

    Raises :class:`tasks.errors.BadParameter` that names every wrong key.
    """
    content = show(root, "HEAD", paths.PARAMS)
    if content is None:
        raise BadParameter(
            f"{paths.PARAMS}: not in the last commit, from which nights work. Commit it, with `git add`."
        )
    return parse(content, paths.PARAMS)


def notice(root: Path) -> NoticeParams:
    """Returns who is told what, as it was last committed; the defaults where that cannot be read."""
    try:
        return committed(root).notice
    except UserMistake:
        return NoticeParams()
