"""The Prefect flow, generated from DVC's graph: ``collect``, then one task a stage of ``dvc.yaml``.

Stages run one after the other in the main thread: DVC locks what it works on, and Prefect delivers SIGTERM there. A
task is a child process (:mod:`flows.process`) that ends with it. DVC is the only cache; Prefect's stay off.
Import this after :mod:`flows.server` has set the environment: Prefect reads its settings when it is imported.
"""

import dataclasses
import shutil
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

from prefect import Flow, Task, allow_failure
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from flows import artifacts, dvc, failures
from flows.execute import Site, execute, remember
from flows.graph import COLLECT, Graph, Stage
from flows.plan import Action, Step, collects, plan
from tasks import paths
from tasks.collect.collect import collect
from tasks.errors import UserMistake
from tasks.params import FlowParams, Params
from tasks.progress import Event

Outcome = Literal["ran", "cached", "skipped", "failed"]


@dataclasses.dataclass(frozen=True)
class StageRun:
    """How one stage ended. ``message`` says why it failed, or why it was skipped."""

    stage: str
    outcome: Outcome
    seconds: float
    message: str = ""

    @property
    def stops_downstream(self) -> bool:
        """Whether the stages that read its outputs must not start."""
        return self.outcome == "failed" or (self.outcome == "skipped" and bool(self.message))


class Watch(Protocol):
    """Who follows a run as it goes: the terminal."""

    def event(self, event: Event) -> None:
        """A stage reports its progress."""

    def retrying(self, stage: str, message: str, attempt: int, seconds: float) -> None:
        """A stage failed with ``message``; ``attempt`` starts in ``seconds``."""

    def ended(self, run: StageRun) -> None:
        """A stage has ended for good."""


class StageFailed(Exception):
    """A stage failed. ``mendable``: another attempt may succeed."""

    def __init__(self, message: str, mendable: bool) -> None:
        super().__init__(message)
        self.mendable = mendable


def make_flow(site: Site, graph: Graph, params: Params, watch: Watch) -> Flow[[str | None, bool], State[Any]]:
    """Returns the flow ``overnight(from_stage, force)`` of the project; it ends Failed when a stage does."""

    def overnight(from_stage: str | None = None, force: bool = False) -> State[Any]:
        night = _Night(site, params, watch)
        night.collect(collects(from_stage))
        if night.failed:
            steps = tuple(Step(stage, Action.RUN) for stage in graph.stages)
        else:
            steps = plan(graph, night.stale(), from_stage, force)
        for step in steps:
            night.step(step)
        counts = ", ".join(
            f"{count} {outcome}"
            for outcome in ("ran", "cached", "skipped", "failed")
            if (count := sum(run.outcome == outcome for run in night.runs.values()))
        )
        if night.failed:
            return Failed(message=f"{night.failed[0].stage}: {night.failed[0].message} ({counts})")
        return Completed(message=counts)

    return Flow(
        overnight,
        name="overnight",
        flow_run_name=site.run,
        validate_parameters=False,
        persist_result=False,
        log_prints=False,
    )


class _Night:
    """The stages of one flow run as they end."""

    def __init__(self, site: Site, params: Params, watch: Watch) -> None:
        self._site, self._params, self._watch = site, params, watch
        self._states: dict[str, State[Any]] = {}
        # What was stale when `collect` had nothing new to bring: the plan needs the same answer.
        self._changes: dvc.Changes | None = None
        self.runs: dict[str, StageRun] = {}

    @property
    def failed(self) -> list[StageRun]:
        return [run for run in self.runs.values() if run.outcome == "failed"]

    def stale(self) -> Collection[str]:
        """Returns the stages that are not up to date, now that ``collect`` has ended."""
        return (self._changes or dvc.changes(self._site.root)).stages.keys()

    def collect(self, wanted: bool) -> None:
        """Copies what is new at the sources and versions it, unless a later stage was asked for."""

        def body() -> State[Any]:
            return self._collect() if wanted else Completed(name="Skipped", message="before --from", data="skipped")

        self._run(COLLECT, "Copy what is new at the sources into data/raw and version it.", (), body)

    def step(self, step: Step) -> None:
        """Does with a stage what the plan says, or nothing when what it reads has failed."""
        stage = step.stage
        upstream = [*([COLLECT] if stage.reads_collected else []), *stage.upstream]
        missing = [name for name in upstream if self.runs[name].stops_downstream]
        why = f"not started, because of {missing[0]}" if missing else ""

        def body() -> State[Any]:
            if missing:
                return Cancelled(name="Skipped", message=why, data="skipped")
            if step.action == Action.SKIPPED:
                return Completed(name="Skipped", message="before --from", data="skipped")
            if step.action == Action.CACHED:
                failures.forget(self._site.root, stage.name)
                return Completed(name="Cached", message="unchanged", data="cached")
            return self._repro(stage, step.force)

        if step.force and not missing:
            # A forced stage computes everything anew; from its last checkpoint it would only write the result again.
            # Its retries do go on from theirs.
            self._forget_checkpoints(stage)
        self._run(stage.name, stage.description, upstream, body, why)

    def _run(
        self, name: str, description: str, upstream: Sequence[str], body: Callable[[], State[Any]], why: str = ""
    ) -> None:
        flow: FlowParams = self._params.flow
        attempts = _Attempts(name, self._site, flow, self._watch)
        stage_task: Task[[], Any] = Task(
            lambda: attempts.run(body),
            name=name,
            task_run_name=name,
            description=description,
            retries=flow.retries.get(name, 0),
            retry_delay_seconds=flow.retry_delay_seconds,
            # Prefect calls functions only: of a bound method it asks whether it is true.
            retry_condition_fn=lambda task, run, state: attempts.may_retry(),
            cache_policy=NO_CACHE,
            persist_result=False,
            log_prints=False,
        )
        started = time.monotonic()
        # What lies downstream of a failure is a task run too, so that the UI shows it and why it did not start.
        # Prefect refuses to wait for a cancelled one, which leaves that edge out of the picture.
        waits = [allow_failure(self._states[one]) for one in upstream if not self._states[one].is_cancelled()]
        state: State[Any] = stage_task(return_state=True, wait_for=waits)
        self._states[name] = state
        seconds = time.monotonic() - started
        outcome = _OUTCOMES.get(state.name or "", "failed")
        message = attempts.message or state.message or "" if outcome == "failed" else why
        run = StageRun(name, outcome, seconds, message)
        self.runs[name] = run
        self._watch.ended(run)

    def _collect(self) -> State[Any]:
        try:
            report = collect(self._params.collect, self._site.root)
        except UserMistake as error:
            remember(self._site, COLLECT, dvc.Result("failed", error.exit_code, str(error)))
            raise StageFailed(str(error), mendable=False) from None
        pointer = paths.RAW.with_name(f"{paths.RAW.name}.dvc")
        same = not any(source.new or source.changed for source in report.sources)
        if same and (self._site.root / pointer).exists():
            changes = dvc.changes(self._site.root)
            if str(pointer) not in changes.data:
                self._changes = changes
                failures.forget(self._site.root, COLLECT)
                return Completed(name="Cached", message="nothing new at the sources", data="cached")
        self._execute(COLLECT, dvc.add_command(paths.RAW))
        return Completed(name="Ran", data="ran")

    def _forget_checkpoints(self, stage: Stage) -> None:
        shutil.rmtree(self._site.root / paths.CHECKPOINTS / stage.name, ignore_errors=True)

    def _repro(self, stage: Stage, force: bool) -> State[Any]:
        result = self._execute(stage.name, dvc.repro_command(stage.name, force))
        # DVC has the result now, so nobody will go on from there.
        self._forget_checkpoints(stage)
        artifacts.report(stage, self._site.root)
        return Completed(name=result.outcome.capitalize(), data=result.outcome)

    def _execute(self, name: str, command: list[str]) -> dvc.Result:
        shown = artifacts.ProgressArtifact(name)

        def on_event(event: Event) -> None:
            self._watch.event(event)
            shown.update(event)

        result = execute(self._site, name, command, on_event)
        if result.outcome == "failed":
            raise StageFailed(result.message, result.mendable)
        return result


_OUTCOMES: Mapping[str, Outcome] = {"Ran": "ran", "Cached": "cached", "Skipped": "skipped"}


class _Attempts:
    """The attempts at one stage: what the last one complained about, and whether another one is worth it."""

    def __init__(self, name: str, site: Site, params: FlowParams, watch: Watch) -> None:
        self._name, self._site, self._params, self._watch = name, site, params, watch
        self._failure: Exception | None = None
        self._count = 0

    @property
    def message(self) -> str:
        if self._failure is None:
            return ""
        kind = "" if isinstance(self._failure, StageFailed) else f"{type(self._failure).__name__}: "
        return kind + " ".join(str(self._failure).split())

    def run(self, body: Callable[[], State[Any]]) -> State[Any]:
        self._count += 1
        try:
            return body()
        except StageFailed as error:
            self._failure = error
            raise
        except Exception as error:
            # A bug of ours: the terminal gets its last line, the log all of it.
            self._failure = error
            log = self._site.root / self._site.log(self._name)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(traceback.format_exc())
            remember(self._site, self._name, dvc.Result("failed", None, self.message))
            raise

    def may_retry(self) -> bool:
        mendable = isinstance(self._failure, StageFailed) and self._failure.mendable
        if mendable and self._count <= self._params.retries.get(self._name, 0):
            self._watch.retrying(self._name, self.message, self._count + 1, self._params.retry_delay_seconds)
        return mendable
