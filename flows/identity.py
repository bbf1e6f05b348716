"""When two states of the project are the same version: their stages' outputs have the same hashes."""

from pathlib import Path

from ruamel.yaml import YAML

from flows import registry
from flows.git import show
from flows.registry import Version


def version_of(root: Path, lock: bytes) -> Version | None:
    """Returns the newest version with the same outputs as those that ``lock``, a ``dvc.lock``, names."""
    wanted = _outputs(lock)
    for version in reversed(registry.versions(root)):
        theirs = show(root, version.commit, "dvc.lock") or b""
        # Parsing a year of versions takes a while; those that lack one of the hashes need no parsing.
        if all(md5.encode() in theirs for md5 in wanted.values()) and _outputs(theirs) == wanted:
            return version
    return None


def _outputs(lock: bytes) -> dict[str, str]:
    """Returns the MD5 of each output of the stages in a ``dvc.lock``, by its path."""
    stages = (YAML(typ="safe").load(lock) or {}).get("stages") or {}
    return {out["path"]: str(out.get("md5")) for stage in stages.values() for out in stage.get("outs", [])}
