"""Keeps ``models/champion``, which ``evaluate`` reads: the INT8 model of the version in production.

It moves only with a model that is measured anew. Were it to follow each promotion, promoting a model would make that
model's own evaluation stale, and a night without news would end with another version.
"""

import enum
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows import contents, dvc, registry, restore
from flows.git import show
from tasks import atomic, paths
from tasks.champion import MODEL_FILES, Champion, Split, split_of
from tasks.champion import read as read_champion
from tasks.errors import BadInput, UserMistake

# In the code of each version that leaves texts that grow in their split.
_GROWS_IN_PLACE = Path("tasks/ingest/file_group.py")

POINTER = paths.CHAMPION.with_name(f"{paths.CHAMPION.name}.dvc")


class Action(enum.StrEnum):
    """What a run does with the champion before it measures a model."""

    KEEP = "keep"
    # Make the folder what its pointer says it is: it was lost or edited, or another commit was checked out.
    RESTORE = "restore"
    # Put the version that is in production now in its place.
    BRING = "bring"


def plan(stale: dvc.Stale | None, here: Champion | None, now: Champion, versioned: bool, intact: bool) -> Action:
    """Returns what to do about the champion for a stage that is going to run. A pure function.

    ``stale`` says why the stage is; ``here`` is what lies in the folder, ``now`` what is in production; ``versioned``
    says whether the folder has a pointer, ``intact`` whether it is what the pointer says.
    """
    if not versioned:
        return Action.BRING
    if stale is not None and _measures_anew(stale):
        return Action.KEEP if intact and here == now else Action.BRING
    return Action.KEEP if intact else Action.RESTORE


def look(root: Path, stage: str, changes: dvc.Changes) -> Action:
    """Returns what to do about the champion for ``stage``, which reads it, with ``changes`` as they are now."""
    try:
        here = read_champion(root / paths.CHAMPION)
    except BadInput:
        here = None
    versioned = (root / POINTER).is_file()
    return plan(changes.stages.get(stage), here, current(root), versioned, intact=str(POINTER) not in changes.data)


def current(root: Path) -> Champion:
    """Returns the version that is in production now."""
    version = registry.champion(root)
    if version is None:
        return Champion()
    return Champion(version=version.tag, commit=version.commit, split=_split(root, version.commit))


def bring(root: Path) -> Champion:
    """Makes ``models/champion`` hold the version that is in production, and returns which one that is.

    Its files come from DVC's cache or a remote, each verified. Raises :class:`UserMistake` when a file is lost, and
    :class:`tasks.errors.TryAgain` when a remote that is needed does not answer. The caller versions the folder.
    """
    now = current(root)
    with atomic.folder(root / paths.CHAMPION) as folder:
        if now.commit is not None:
            try:
                fetch(root, now.commit, paths.INT8, folder, MODEL_FILES)
            except UserMistake as error:
                raise UserMistake(
                    f"the champion {now.version} cannot be had: {error}. Name the remote that has it (`dvc remote add "
                    "-d NAME URL`), or promote another version."
                ) from None
        atomic.write_json(folder / paths.CHAMPION_RECORD.name, now.model_dump())
    return now


def fetch(root: Path, commit: str, output: Path, folder: Path, names: Collection[str] = ()) -> None:
    """Puts the files ``names`` (none: all) of a commit's ``output``, which is a folder, into ``folder``.

    They come from DVC's cache or a remote, each verified. Raises :class:`UserMistake` that names one that is lost.
    """
    outputs = [one for one in contents.recorded(root, commit) if one.path == output]
    if not outputs:
        raise UserMistake(f"commit {commit[:12]} records no {output}")
    scratch = root / paths.SCRATCH / "champion"
    # An attempt that was interrupted may have been at another version.
    shutil.rmtree(scratch, ignore_errors=True)
    with dvc.store(root, restore.remote(root)) as store:
        fetched = restore.place(store, outputs, scratch, root, lambda done, total: None, paths.POST_TRAINING)
    for one in fetched:
        if one.source is restore.Source.NOWHERE:
            raise UserMistake(str(one))
    every = sorted(path for path in (scratch / output).rglob("*") if path.is_file())
    for name in names or [path.relative_to(scratch / output).as_posix() for path in every]:
        found = scratch / output / name
        if not found.is_file():
            raise UserMistake(f"commit {commit[:12]} records no {output / name}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(found, folder / name)
    shutil.rmtree(scratch)


def _measures_anew(stale: dvc.Stale) -> bool:
    # Outputs that are gone are to be what they were; only other inputs give another measurement.
    return stale.never_run or any(
        change.kind != "output" and Path(change.name) != paths.CHAMPION for change in stale.changes
    )


def _split(root: Path, commit: str) -> Split | None:
    try:
        params = YAML(typ="safe", pure=True).load(show(root, commit, paths.PARAMS) or b"")
    except YAMLError:
        return None
    return split_of(params, grows_in_place=show(root, commit, _GROWS_IN_PLACE) is not None)
