"""The identity of a stage's inputs, for work that is kept outside DVC: checkpoints must not meet other inputs."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tasks import paths
from tasks.section import Section

PROJECT = Path(__file__).parent.parent


def key(stage: str, section: Section, files: Iterable[Path]) -> str:
    """Returns 32 hexadecimal digits that change with the parameters, ``files``, the locked packages and the code.

    They are followed by how the work is cut (``-2-1``: two processes, one thread each; ``-4-1-1x1f1bxautox4x1x1``: and
    the mesh), where a section has that.
    """
    identity = section.identity()
    cut = [identity.pop(name) for name in section.CUT]
    parts = ["x".join(map(str, part.values())) if isinstance(part, Mapping) else str(part) for part in cut]
    whole = hashlib.sha256()
    whole.update(json.dumps(identity, sort_keys=True).encode())
    for file in [*files, paths.LOCK, *code_of(stage)]:
        whole.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return "-".join([whole.hexdigest()[:32], *parts])


def code_of(stage: str) -> list[Path]:
    """Returns the source files that may decide what ``stage`` writes: its own, the shared ones, and the model's."""
    folders = [PROJECT / "lm", PROJECT / "tasks" / stage, PROJECT / "tasks" / "parallel"]
    return sorted([*(file for folder in folders for file in folder.rglob("*.py")), *(PROJECT / "tasks").glob("*.py")])
