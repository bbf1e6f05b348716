"""The Prefect flow, generated from DVC's graph: ``collect``, then one task a stage of ``dvc.yaml``.

Stages run one after the other in the main thread: DVC locks what it works on, and Prefect delivers SIGTERM there. A
task is a child process (:mod:`flows.process`) that ends with it. DVC is the only cache; Prefect's stay off.
Import this after :mod:`flows.server` has set the environment: Prefect reads its settings when it is imported.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefect import Flow, Task, allow_failure
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows import failures
from flows.attempts import Attempts, StageFailed
from flows.bodies import Bodies
from flows.execute import Site, drop_old_logs
from flows.graph import CHAMPION, CHECKOUT, COLLECT, INIT, PUBLISH, Graph
from flows.plan import Action, Step, collects, plan
from flows.publish import ChampionMoved, Look, Published, publish
from flows.runs import Record, Resumed
from flows.watch import Outcome, StageRun, Watch
from tasks import atomic
from tasks.errors import DiskFull, TryAgain, UserMistake
from tasks.params import FlowParams, Params

_OUTCOMES: Mapping[str, Outcome] = {"Ran": "ran", "Cached": "cached", "Skipped": "skipped"}


def make_flow(
    site: Site, graph: Graph, params: Params, watch: Watch, record: Record
) -> Flow[[str | None, bool], State[Any]]:
    """Returns the flow ``overnight(from_stage, force)`` of the project; it ends Failed when a stage does."""

    def overnight(from_stage: str | None = None, force: bool = False) -> State[Any]:
        record.set(flow_run=str(flow_run.get_id()))
        night = Night(site, params, watch, record.resumed)
        try:
            with atomic.disk_full_is_told(site.root):
                night.work(graph, from_stage, force)
        except DiskFull as error:
            # Between two stages.
            return Failed(message=str(error))
        if night.failed:
            return Failed(message=f"{night.failed[0].stage}: {night.failed[0].message} ({night.counts()})")
        return Completed(message=night.counts())

    return Flow(
        overnight,
        name="overnight",
        flow_run_name=site.run,
        validate_parameters=False,
        persist_result=False,
        log_prints=False,
    )


class Night:
    """The tasks of one flow run, in their order and as they end; ``resumed``: what earlier attempts at it have done."""

    def __init__(self, site: Site, params: Params, watch: Watch, resumed: Resumed) -> None:
        self.site = site
        self._params, self._watch, self._resumed = params, watch, resumed
        self._states: dict[str, State[Any]] = {}
        self.bodies = Bodies(site, params, watch)
        self.runs: dict[str, StageRun] = {}

    @property
    def failed(self) -> list[StageRun]:
        return [run for run in self.runs.values() if run.outcome == "failed"]

    def counts(self) -> str:
        """Returns in words how many stages ended how."""
        return ", ".join(
            f"{count} {outcome}"
            for outcome in ("ran", "cached", "skipped", "failed")
            if (count := sum(run.outcome == outcome for run in self.runs.values()))
        )

    def checkout(self) -> bool:
        """Makes the outputs what the commit's pointers say, from DVC's cache, and from a remote where it lacks them.

        Returns whether that went well; it is a row of its own only where it did not.
        """
        started = time.monotonic()
        try:
            self.bodies.checkout()
        except StageFailed as error:
            failed = StageRun(CHECKOUT, "failed", time.monotonic() - started, str(error), error.exit_code)
            self.runs[CHECKOUT] = failed
            self._watch.began(CHECKOUT)
            self._watch.ended(failed)
            return False
        return True

    def work(self, graph: Graph, from_stage: str | None, force: bool) -> None:
        """Collects, then does with each stage what the plan says."""
        bodies = self.bodies
        drop_old_logs(self.site.home or self.site.root)
        self.collect(graph, collects(from_stage))
        if self.failed:
            steps = tuple(Step(stage, Action.RUN) for stage in graph.stages)
        else:
            # What this attempt has forced already is not forced again when the champion has moved meanwhile.
            done = {run.stage for run in self.runs.values() if run.outcome == "ran"}
            steps = plan(graph, bodies.stale(), from_stage, force, self._resumed.finished | done)
            running = {step.stage.name for step in steps if step.action == Action.RUN}
            if any(stage.reads_init and stage.name in running for stage in graph.stages):
                self._run(
                    INIT,
                    "Fetch and version what training starts from.",
                    [COLLECT],
                    lambda: bodies.bring_init(graph, running),
                )
                # The plan follows from what training starts from.
                steps = plan(graph, bodies.stale(), from_stage, force, self._resumed.finished | done)
        for step in steps:
            self.step(step)

    def publish(self, tell: Callable[[str], object], since: str | None, graph: Graph) -> Published | None:
        """Makes a version of the outputs of a run that began with the commit ``since``.

        Returns None when it failed, or when the champion has moved meanwhile.
        """
        published: list[Published] = []
        # Where nothing was stale and nothing ran, all is as it was when `collect` looked.
        seen = self.bodies.seen
        idle = seen is not None and not seen.stages and all(run.outcome == "cached" for run in self.runs.values())
        look = Look(graph, seen) if idle and seen is not None else None

        def body() -> State[Any]:
            try:
                published.append(publish(self.site.root, tell, self.site.root / self.site.log(PUBLISH), since, look))
            except ChampionMoved as error:
                return Completed(name="Skipped", message=str(error), data="skipped")
            except (UserMistake, TryAgain) as error:
                raise self.bodies.refused(PUBLISH, error) from None
            return Completed(name="Ran" if published[0].new else "Cached", data=published[0].version.name)

        self._run(PUBLISH, "Push the data, commit, push Git, register the version, promote it.", [*self.runs], body)
        return published[0] if published else None

    def collect(self, graph: Graph, wanted: bool) -> None:
        """Copies what is new at the sources and versions it, unless a later stage was asked for."""
        # What an earlier pass saw is stale itself by now.
        self.bodies.seen = None

        def body() -> State[Any]:
            if not wanted:
                return Completed(name="Skipped", message="before --from", data="skipped")
            return self.bodies.collect(graph)

        self._run(COLLECT, "Copy what is new at the sources into data/raw and version it.", (), body)

    def step(self, step: Step) -> None:
        """Does with a stage what the plan says, or nothing when what it reads has failed."""
        stage = step.stage
        # Where training cannot start, no stage begins for nothing, although some do not read what it starts from.
        refused = INIT in self.runs and self.runs[INIT].stops_downstream and step.action == Action.RUN
        brought = [INIT] if INIT in self.runs and (stage.reads_init or refused) else []
        upstream = [*([COLLECT] if stage.reads_collected else []), *brought, *stage.upstream]
        if stage.reads_champion and step.action == Action.RUN and not self._missing(upstream):
            self._run(
                CHAMPION,
                "Fetch and version the model in production.",
                upstream,
                lambda: self.bodies.bring_champion(stage),
            )
            upstream += [CHAMPION] if CHAMPION in self.runs else []
        missing = self._missing(upstream)
        left = "stale, and left out by --from: what follows is of what it made before" if step.stale else ""
        why = f"not started, because of {missing[0]}" if missing else left

        def body() -> State[Any]:
            if missing:
                return Cancelled(name="Skipped", message=why, data="skipped")
            if step.action == Action.SKIPPED:
                return Completed(name="Skipped", message="before --from", data="skipped")
            if step.action == Action.CACHED:
                failures.forget(self.site.root, stage.name)
                return Completed(name="Cached", message="unchanged", data="cached")
            return self.bodies.repro(stage, step.force)

        if step.force and not missing and stage.name not in self._resumed.begun:
            # A forced stage computes everything anew; from its last checkpoint it would only write the result again.
            # Its retries do go on from theirs.
            self.bodies.forget_checkpoints(stage)
        self._run(stage.name, stage.description, upstream, body, why, cut_off=bool(missing))

    def _missing(self, upstream: Sequence[str]) -> list[str]:
        return [name for name in upstream if self.runs[name].stops_downstream]

    def _run(
        self,
        name: str,
        description: str,
        upstream: Sequence[str],
        body: Callable[[], State[Any]],
        why: str = "",
        cut_off: bool = False,
    ) -> None:
        flow: FlowParams = self._params.flow
        attempts = Attempts(name, self.site, flow, self._watch)
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
        self._watch.began(name)
        started = time.monotonic()
        # What lies downstream of a failure is a task run too, so that the UI shows it and why it did not start.
        # Prefect refuses to wait for a cancelled one, which leaves that edge out of the picture.
        waits = [allow_failure(self._states[one]) for one in upstream if not self._states[one].is_cancelled()]
        state: State[Any] = stage_task(return_state=True, wait_for=waits)
        self._states[name] = state
        seconds = time.monotonic() - started
        outcome = _OUTCOMES.get(state.name or "", "failed")
        if name in (CHAMPION, INIT) and outcome == "cached":
            # No row of its own for what only concerns the stage that asked.
            return
        message = attempts.message or state.message or "" if outcome == "failed" else why
        run = StageRun(name, outcome, seconds, message, attempts.exit_code if outcome == "failed" else None, cut_off)
        self.runs[name] = run
        self._watch.ended(run)
