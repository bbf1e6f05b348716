"""The INT8 model of a version, for those who write with it: brought and verified, without the rest of the version."""

from collections.abc import Callable
from pathlib import Path

from flows import contents, dvc, project, push, registry, restore
from tasks import paths
from tasks.errors import TryAgain, UserMistake


def model_of(root: Path, name: str, say: Callable[[str], object]) -> Path:
    """Returns the folder of the INT8 model of the version ``name``, each file verified; `overnight restore` has it too.

    What is in production may be known to Git's remote alone, which is asked; ``say`` is told that it does not answer.
    Raises :class:`UserMistake` when there is no such version, or a file of its model is lost.
    """
    try:
        push.fetched(root)
    except TryAgain as error:
        say(f"{str(error).rstrip('.')}. What is known here is taken.")
    version = registry.resolve(root, name)
    outputs = [output for output in contents.recorded(root, version.commit) if output.path == paths.INT8]
    target = root / restore.FOLDER / version.name
    mark = target / project.RESTORED
    if mark.is_file() and mark.read_text().strip() != version.commit:
        # Of another version that had this name on this machine.
        target = target.with_name(f"{version.name}-{version.commit[:12]}")
    restore.claim(target, version.commit, "--version")
    with dvc.store(root, restore.remote(root)) as store:
        fetched = restore.place(store, outputs, target, root, lambda done, total: None, paths.POST_TRAINING)
        if lost := [one for one in fetched if one.source is restore.Source.NOWHERE]:
            cure = f" {restore.cure(store, version.name, fetched)}" if lost[0].where else ""
            raise UserMistake(f"{version.name}: {lost[0]}.{cure}")
    return target / paths.INT8
