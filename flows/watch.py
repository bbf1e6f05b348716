"""Who follows a run as it goes, and what there is to follow. Needs no Prefect."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

from tasks.errors import EXIT_USER_MISTAKE
from tasks.progress import Event

EXIT_FAILED = 1
Outcome = Literal["ran", "cached", "skipped", "failed"]


@dataclasses.dataclass(frozen=True)
class StageRun:
    """How one stage ended. ``message`` says why it failed, or why it was skipped.

    ``exit_code`` is that of a failed stage's own command, None where that did not fail or was not reached.
    """

    stage: str
    outcome: Outcome
    seconds: float
    message: str = ""
    exit_code: int | None = None
    # It was to run, and what it reads has failed.
    cut_off: bool = False

    @property
    def stops_downstream(self) -> bool:
        """Whether the stages that read its outputs must not start."""
        return self.outcome == "failed" or self.cut_off


def exit_code(failed: Sequence[StageRun]) -> int:
    """Returns the code of a run whose stages ``failed``: that of a mistake where each has met one."""
    mistakes = [one.exit_code == EXIT_USER_MISTAKE for one in failed]
    return EXIT_USER_MISTAKE if mistakes and all(mistakes) else EXIT_FAILED


class Watch(Protocol):
    """Somebody who follows a run: the terminal, the record that `overnight status` reads."""

    def began(self, stage: str) -> None:
        """A stage is looked at; it may turn out to be unchanged."""

    def event(self, event: Event) -> None:
        """A stage reports its progress."""

    def retrying(self, stage: str, message: str, attempt: int, seconds: float) -> None:
        """A stage failed with ``message``; ``attempt`` starts in ``seconds``."""

    def ended(self, run: StageRun) -> None:
        """A stage has ended for good."""


class All:
    """Several who follow one run."""

    def __init__(self, *watches: Watch) -> None:
        self._watches = watches

    def began(self, stage: str) -> None:
        for watch in self._watches:
            watch.began(stage)

    def event(self, event: Event) -> None:
        for watch in self._watches:
            watch.event(event)

    def retrying(self, stage: str, message: str, attempt: int, seconds: float) -> None:
        for watch in self._watches:
            watch.retrying(stage, message, attempt, seconds)

    def ended(self, run: StageRun) -> None:
        for watch in self._watches:
            watch.ended(run)
