"""What collecting did, as a flow in another process reads it from ``.overnight/collect.json``.

The flow may be of another version than the stage that wrote it, so keys that are not known here are passed over.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import atomic, paths
from tasks.errors import BadInput

REPORT = paths.SCRATCH / "collect.json"


class SourceReport(BaseModel):
    """What collecting found at one source: counts of files, and bytes of all of them together.

    ``gone`` counts the files in ``data/raw/NAME`` that the source does not offer any more, or never did. They stay,
    and the stage ``ingest`` reads them.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    new: int
    changed: int
    unchanged: int
    gone: int
    bytes: int


class InitReport(BaseModel):
    """What collecting did about the checkpoint that ``train.init`` names; ``gone``: it is no longer there."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    state: Literal["new", "changed", "unchanged", "gone"]
    notice: str | None = None


class CollectReport(BaseModel):
    """What collecting did, source by source in the order of ``params.yaml``.

    ``unused`` names what lies in ``data/raw`` and belongs to no source. ``notices``: what the user was told.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    sources: list[SourceReport]
    unused: list[str] = []
    notices: list[str] = []
    # None: training does not start from a checkpoint.
    init: InitReport | None = None

    @property
    def has_news(self) -> bool:
        """Whether anything was copied. What somebody deleted from ``data/raw`` is no news; DVC sees that."""
        return any(source.new or source.changed for source in self.sources)


def write(report: CollectReport, root: Path = Path()) -> None:
    """Writes the report of the project in ``root``."""
    atomic.write_json(root / REPORT, report.model_dump())


def forget(root: Path = Path()) -> None:
    """Removes the report of an earlier collecting: whoever reads one afterwards reads that of this one."""
    (root / REPORT).unlink(missing_ok=True)


def read(root: Path = Path()) -> CollectReport:
    """Returns the report of the last collecting that ended well. Raises :class:`BadInput` when there is none."""
    try:
        return CollectReport.model_validate_json((root / REPORT).read_bytes())
    except (OSError, ValidationError):
        raise BadInput(f"{root / REPORT}: no report of collecting. Collect first: python -m tasks.collect") from None
