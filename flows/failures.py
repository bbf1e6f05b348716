"""What is remembered of a failed stage until it starts again: ``.overnight/failed/STAGE.json``."""

import contextlib
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import atomic, paths

FAILED = paths.SCRATCH / "failed"


class Failure(BaseModel):
    """The last failure of a stage. ``log`` is relative to the project."""

    model_config = ConfigDict(frozen=True)

    stage: str
    run: str
    at: datetime
    exit_code: int | None
    message: str
    log: Path


def remember(root: Path, failure: Failure) -> None:
    """Keeps ``failure``, in place of an earlier one of the same stage."""
    atomic.write_json(_file(root, failure.stage), failure.model_dump(mode="json"))


def forget(root: Path, stage: str) -> None:
    """Drops what is kept of ``stage``, which starts anew or is up to date."""
    _file(root, stage).unlink(missing_ok=True)


def recall(root: Path) -> dict[str, Failure]:
    """Returns the stages whose last attempt failed."""
    found = {}
    for file in sorted((root / FAILED).glob("[!.]*.json")):
        with contextlib.suppress(ValidationError, OSError):
            failure = Failure.model_validate_json(file.read_bytes())
            found[failure.stage] = failure
    return found


def _file(root: Path, stage: str) -> Path:
    return root / FAILED / f"{file_name(stage)}.json"


def file_name(stage: str) -> str:
    """Returns ``stage`` as a file name; stages of other folders hold slashes and colons."""
    return "".join(letter if letter.isalnum() or letter in "-_@" else "-" for letter in stage)
