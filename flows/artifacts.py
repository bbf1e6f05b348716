"""What Prefect's UI shows beside a stage: its progress while it works, its report when it has ended.

An artifact is a courtesy: whatever goes wrong with one is dropped and never fails a run, nor does a run wait for a
server that is away.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import SettingsContext, get_settings_context
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES
from prefect.utilities.context import get_task_and_flow_run_ids

from flows.graph import Stage
from flows.leaves import leaves
from tasks import paths
from tasks.markdown import cell
from tasks.progress import Event

_SECONDS_BETWEEN_UPDATES = 2.0
_SECONDS_AFTER_A_FAILURE = 60.0
_SECONDS_TO_ANSWER = 5.0
# Prefect keeps artifacts in its database; a report larger than this is better read in its file.
_MOST_ROWS = 200
_REPORTS = (
    paths.CORPUS_REPORT,
    paths.MANIFEST,
    paths.TRAIN_REPORT,
    paths.AUDIT,
    paths.EVALUATION,
    paths.CARD / "README.md",
)


class ProgressArtifact:
    """The progress artifact of one stage; call it inside the stage's task run, as often as there are events."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._artifact: UUID | None = None
        self._impatient: _Impatient | None = None
        self._updated = self._failed = -math.inf

    def update(self, event: Event) -> None:
        """Creates or updates the artifact, at most every two seconds."""
        if event.notice:
            return
        now = time.monotonic()
        complete = event.done >= event.total
        if now - self._failed < _SECONDS_AFTER_A_FAILURE:
            return
        if now - self._updated < _SECONDS_BETWEEN_UPDATES and not complete:
            return
        self._updated = now
        percent = 100.0 * event.done / event.total if event.total else 0.0
        description = f"{event.step}: {event.done:,.0f} of {event.total:,.0f} {event.unit}. {event.describe_numbers()}"
        try:
            self._impatient = self._impatient or _Impatient()
            with self._impatient.asking() as client:
                if self._artifact is None:
                    self._artifact = _create(client, "progress", f"{self._stage}-progress", description, percent)
                else:
                    client.update_artifact(self._artifact, ArtifactUpdate(description=description, data=percent))
        except Exception:
            # One failed call is likely followed by others, and each may wait for a timeout, as this one has.
            self._failed = time.monotonic()
            self.close()

    def close(self) -> None:
        """Ends the connection; the next update makes another."""
        if self._impatient is not None:
            self._impatient.close()
        self._impatient = None


def report(stage: Stage, root: Path) -> None:
    """Creates a Markdown artifact from each report that ``stage`` has written."""
    for path in reports(stage):
        with (
            contextlib.suppress(Exception),
            contextlib.closing(_Impatient()) as impatient,
            impatient.asking() as client,
        ):
            text = (root / path).read_text(encoding="utf-8")
            markdown = table(json.loads(text)) if path.suffix == ".json" else text
            _create(client, "markdown", f"{stage.name}-{path.stem}", str(path), markdown)


class _Impatient:
    """A client that asks once; the run's own may take minutes for a call, in which nobody looks how the stage does.

    To make one takes the processor for longer than many a call.
    """

    def __init__(self) -> None:
        here = get_settings_context()
        settings = here.settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: 0})
        self._settings = SettingsContext(profile=here.profile, settings=settings)
        self._opened = contextlib.ExitStack()
        client = get_client({"timeout": _SECONDS_TO_ANSWER}, sync_client=True)
        self._client: SyncPrefectClient = self._opened.enter_context(client)

    @contextlib.contextmanager
    def asking(self) -> Iterator[SyncPrefectClient]:
        # Where the client reads how often it may ask.
        with self._settings:
            yield self._client

    def close(self) -> None:
        self._opened.close()


def _create(client: SyncPrefectClient, kind: str, name: str, description: str, data: str | float) -> UUID:
    """Creates an artifact of the run that is at work here. Prefect's own functions ask by the run's client."""
    task_run, flow_run = get_task_and_flow_run_ids()
    made = ArtifactCreate(
        type=kind, key=key(name), description=description, data=data, task_run_id=task_run, flow_run_id=flow_run
    )
    return client.create_artifact(made).id


def reports(stage: Stage) -> list[Path]:
    """Returns the report files among or inside the outputs of ``stage``, relative to the project."""
    inside = [path for path in _REPORTS if any(output in path.parents for output in stage.outputs)]
    return [*(output for output in stage.outputs if output.suffix == ".json"), *inside]


def table(content: object) -> str:
    """Returns a Markdown table with a row for each scalar in parsed JSON, named by the path that leads to it."""
    rows = list(leaves(content, ".{}"))
    lines = [f"| {cell(name)} | {cell(_format(value))} |" for name, value in rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        lines.append(f"| … | {len(rows) - _MOST_ROWS} more in the file |")
    return "\n".join(["| | |", "|---|---|", *lines])


def key(name: str) -> str:
    """Returns ``name`` with nothing but the lowercase letters, digits and dashes that Prefect allows in a key."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower()).strip("-")


def _format(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
