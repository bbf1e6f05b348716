"""The checks before anything runs: is this a project, with Git, DVC, and parameters that fit?"""

from pathlib import Path

from tasks import paths
from tasks.errors import UserMistake
from tasks.params import Params, read

DAG = Path("dvc.yaml")


class NotAProject(UserMistake):
    """The current folder is not the root of a project, or the project lacks Git or DVC."""


def find() -> Path:
    """Returns the project's folder, the current one. Raises :class:`NotAProject` when something is missing."""
    root = Path.cwd()
    for name in (DAG, paths.PARAMS):
        if not (root / name).is_file():
            raise NotAProject(f"{root}: no {name} here. Change to the project's folder and run this again.")
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        raise NotAProject(f"{root}: not in a Git repository. Run `git init`, or clone the project with Git.")
    if not (root / ".dvc").is_dir():
        raise NotAProject(f"{root}: no DVC repository here. Run `dvc init` (with --subdir below the Git root).")
    return root


def parameters(root: Path) -> Params:
    """Returns ``params.yaml``, whole. Raises :class:`tasks.errors.BadParameter` that names every wrong key."""
    return read(root / paths.PARAMS)
