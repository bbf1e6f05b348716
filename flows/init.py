"""Keeps ``models/init``, which training starts from, as ``train.init`` says: from scratch, or production's version.

A checkpoint in a folder is copied by ``collect``. The version in production moves only with a model that is trained
anew, for the reason that :mod:`flows.champion` gives.
"""

from collections.abc import Collection
from pathlib import Path

from flows import champion, dvc, registry
from flows.champion import Action
from flows.graph import Graph
from tasks import atomic, init, paths
from tasks.errors import BadInput, UserMistake
from tasks.init import Init

POINTER = paths.INIT.with_name(f"{paths.INIT.name}.dvc")


def trains_anew(graph: Graph, changes: dvc.Changes, running: Collection[str]) -> bool:
    """Whether the stages ``running`` give another training than the last one. A pure function.

    Outputs that are gone are to be what they were, and what a stage makes changes only with what it is made from.
    """
    readers = {stage.name for stage in graph.stages if stage.reads_init}
    made = {output for stage in graph.stages for output in stage.outputs} | {paths.INIT}
    concerned = readers.union(*(graph.ancestors(name) for name in readers)) & set(running)
    stale = [changes.stages[name] for name in concerned if name in changes.stages]
    return any(
        one.never_run or any(change.kind != "output" and Path(change.name) not in made for change in one.changes)
        for one in stale
    )


def plan(wanted: str, here: Init | None, now: Init, anew: bool, versioned: bool, intact: bool) -> Action:
    """Returns what to do about ``models/init`` before a stage that reads it. A pure function.

    ``wanted`` is ``train.init``; ``here`` is what lies in the folder, ``now`` what is in production; ``anew`` says
    whether another model is going to be trained, ``versioned`` whether the folder has a pointer, ``intact`` whether it
    is what the pointer says.
    """
    if init.kind(wanted) == "checkpoint":
        return Action.KEEP if intact or not versioned else Action.RESTORE
    if not versioned or (intact and (here is None or here.init != wanted)):
        return Action.BRING
    if anew and wanted == init.PREVIOUS:
        same = here is not None and (here.version, here.commit) == (now.version, now.commit)
        return Action.KEEP if intact and same else Action.BRING
    return Action.KEEP if intact else Action.RESTORE


def look(root: Path, wanted: str, graph: Graph, changes: dvc.Changes, running: Collection[str]) -> Action:
    """Returns what to do about ``models/init`` before the stages ``running``, with ``changes`` as they are now."""
    try:
        here = init.read(root / paths.INIT)
    except BadInput:
        here = None
    anew = trains_anew(graph, changes, running)
    intact = str(POINTER) not in changes.data
    return plan(wanted, here, current(root, wanted), anew, (root / POINTER).is_file(), intact)


def current(root: Path, wanted: str) -> Init:
    """Returns what training that begins now starts from, without the files' digests."""
    version = registry.champion(root) if wanted == init.PREVIOUS else None
    if version is None:
        return Init(init=wanted)
    return Init(init=wanted, version=version.tag, commit=version.commit)


def bring(root: Path, wanted: str) -> Init:
    """Makes ``models/init`` hold what ``wanted``, ``scratch`` or ``previous``, means now, and returns that.

    Raises :class:`UserMistake` when a file of the version is lost, and :class:`tasks.errors.TryAgain` when a remote
    that is needed does not answer. The caller versions the folder.
    """
    now = current(root, wanted)
    with atomic.folder(root / paths.INIT) as folder:
        if now.commit is not None:
            try:
                champion.fetch(root, now.commit, paths.FLOAT, folder)
            except UserMistake as error:
                raise UserMistake(
                    f"train.init: {now.version} cannot be had: {error}. Name the remote that has it (`dvc remote add "
                    "-d NAME URL`), or set init: scratch."
                ) from None
        init.write_record(folder, now)
    return now
