"""In what environment each stage was computed: noted when it ran, read when what it made is published.

The process that publishes may have other variables than the one that computed, or be on another machine. A note belongs
to the stage's outputs as ``dvc.lock`` has them. It lies in the project, also when a night's worktree is at work, for a
later night may find the stage cached.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from flows import contents, environment, failures, worktree
from flows.environment import Environment
from tasks import atomic, paths
from tasks.errors import UserMistake

FOLDER = paths.SCRATCH / "computed"
# Of each stage, as many as there are logs of runs.
_KEPT_NOTES = 30


def note(root: Path, stage: str) -> None:
    """Notes that this process has computed ``stage``. What cannot be noted fails no run: it is not known, then."""
    with contextlib.suppress(UserMistake, OSError):
        digest = _digests(root).get(stage)
        if digest is None:
            # It makes nothing.
            return
        folder = _folder(root, stage)
        atomic.write_json(folder / f"{digest}.json", environment.content(environment.record(root)))
        for old in sorted(folder.glob("[!.]*.json"), key=lambda file: file.stat().st_mtime)[:-_KEPT_NOTES]:
            old.unlink(missing_ok=True)


def elsewhere(root: Path, here: Environment) -> dict[str, Mapping[str, str] | None]:
    """Returns what ``environment.json`` has to say of the project's present outputs beside ``here``.

    These are the stages that were computed in another environment, with the facts that were others there, or None where
    nothing is noted.
    """
    found: dict[str, Mapping[str, str] | None] = {}
    for stage, digest in _digests(root).items():
        noted = _read(_folder(root, stage) / f"{digest}.json")
        facts = None if noted is None else environment.other_facts(stage, noted, here)
        if facts is None or facts:
            found[stage] = facts
    return found


def _read(file: Path) -> Environment | None:
    try:
        found = Environment.model_validate_json(file.read_bytes())
        # What is still in use is not old.
        os.utime(file)
    except (OSError, ValidationError):
        return None
    return found


def _digests(root: Path) -> dict[str, str]:
    """Returns for each stage in ``dvc.lock`` what its outputs are, as one digest."""
    outputs: dict[str, list[str]] = {}
    for output in contents.present(root):
        if output.stage is not None:
            outputs.setdefault(output.stage, []).append(f"{output.path} {output.md5}")
    return {stage: hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() for stage, lines in outputs.items()}


def _folder(root: Path, stage: str) -> Path:
    return worktree.main(root) / FOLDER / failures.file_name(stage)
