"""Where the last run stopped, in words: what its record and the checkpoints of its stages tell. Needs no torch."""

import contextlib
from pathlib import Path

from flows import running, runs
from lm.hugging_face_config import Unusable
from tasks import inputs, paths
from tasks.errors import UserMistake
from tasks.params import Params, read
from tasks.quantize import params as quantize
from tasks.train import params as train


def place(root: Path, last: runs.Run | None) -> Path:
    """Returns where the ``last`` run worked: the project at ``root``, or a night's worktree while that is there."""
    if last is None or last.worktree is None or not (root / last.worktree / paths.PARAMS).is_file():
        return root
    return root / last.worktree


def recall(root: Path, params: Params, last: runs.Run | None = None) -> dict[str, str]:
    """Returns for each stage that was stopped where that was, such as ``at step 16 of 30``.

    A checkpoint counts only as long as a run would go on from it: while parameters, code and inputs are the same. That
    of a ``last`` run which was a night lies in its worktree, with the parameters that it goes on with.
    """
    found = {}
    where, told = place(root, last), ""
    if last is not None and where != root:
        params, told = read(where / paths.PARAMS), f" (run {last.run})"
    trainings = {
        "train": (params.train, train.checkpoint_inputs),
        "quantize": (params.quantize, quantize.checkpoint_inputs),
    }
    for stage, (section, checkpoint_inputs) in trainings.items():
        try:
            # The locked packages take part, those that lie there.
            with contextlib.chdir(where):
                key = inputs.key(stage, section, checkpoint_inputs())
        except (OSError, UserMistake, Unusable):
            # What it reads is not there, so it has not begun.
            continue
        saved = [file.name.split("-")[1] for file in (where / paths.CHECKPOINTS / stage / key).glob("step-*.pt")]
        if saved:
            found[stage] = f"at step {max(map(int, saved)):,} of {section.steps:,}{told}"
    now = running.read(root)
    stage_now = now.at_work() if now is not None else None
    # With checkpoints that fit no longer it is stale, and begins anew.
    if now is not None and stage_now is not None and not any((where / paths.CHECKPOINTS / stage_now.stage).glob("*/*")):
        before = "its first checkpoint" if stage_now.stage in trainings else "its end"
        found[stage_now.stage] = f"before {before} (run {now.run})"
    return found
