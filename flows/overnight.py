"""The Prefect flow, generated from DVC's graph: ``collect``, then one task a stage of ``dvc.yaml``.

Stages run one after the other in the main thread: DVC locks what it works on, and Prefect delivers SIGTERM there. A
task is a child process (:mod:`flows.process`) that ends with it. DVC is the only cache; Prefect's stay off.
Import this after :mod:`flows.server` has set the environment: Prefect reads its settings when it is imported.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefect import Flow, Task, allow_failure
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows import artifacts, champion, computed, dvc, dvc_lock, failures, init, raw, remotely, worktree
from flows.attempts import Attempts, StageFailed
from flows.execute import Classify, Site, drop_old_logs, execute, remember
from flows.graph import CHAMPION, CHECKOUT, COLLECT, INIT, PUBLISH, Graph, Stage
from flows.plan import Action, Step, collects, plan
from flows.publish import ChampionMoved, Look, Published, publish
from flows.runs import Record, Resumed
from flows.watch import Outcome, StageRun, Watch
from tasks import atomic, paths
from tasks.champion import read as read_champion
from tasks.collect.report import read as read_report
from tasks.errors import EXIT_USER_MISTAKE, DiskFull, TryAgain, UserMistake
from tasks.init import PREVIOUS
from tasks.init import read as read_init
from tasks.params import FlowParams, Params
from tasks.progress import Event


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
    """The stages of one flow run as they end; ``resumed`` says what earlier attempts at it have done."""

    def __init__(self, site: Site, params: Params, watch: Watch, resumed: Resumed) -> None:
        self.site = site
        self._params, self._watch, self._resumed = params, watch, resumed
        self._states: dict[str, State[Any]] = {}
        # What was stale when `collect` had nothing new to bring: the plan needs the same answer.
        self._changes: dvc.Changes | None = None
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
            self._ask_remote(CHECKOUT, dvc.checkout_command(self.site.root, self._params.publish.data_remote))
        except StageFailed as error:
            failed = StageRun(CHECKOUT, "failed", time.monotonic() - started, str(error), error.exit_code)
            self.runs[CHECKOUT] = failed
            self._watch.began(CHECKOUT)
            self._watch.ended(failed)
            return False
        return True

    def work(self, graph: Graph, from_stage: str | None, force: bool) -> None:
        """Collects, then does with each stage what the plan says."""
        drop_old_logs(self.site.home or self.site.root)
        self.collect(graph, collects(from_stage))
        if self.failed:
            steps = tuple(Step(stage, Action.RUN) for stage in graph.stages)
        else:
            # What this attempt has forced already is not forced again when the champion has moved meanwhile.
            done = {run.stage for run in self.runs.values() if run.outcome == "ran"}
            steps = plan(graph, self.stale(), from_stage, force, self._resumed.finished | done)
            running = {step.stage.name for step in steps if step.action == Action.RUN}
            if any(stage.reads_init and stage.name in running for stage in graph.stages):
                self._run(
                    INIT, "Fetch and version what training starts from.", [COLLECT], lambda: self._init(graph, running)
                )
                # The plan follows from what training starts from.
                steps = plan(graph, self.stale(), from_stage, force, self._resumed.finished | done)
        for step in steps:
            self.step(step)

    def publish(self, tell: Callable[[str], object], since: str | None, graph: Graph) -> Published | None:
        """Makes a version of the outputs of a run that began with the commit ``since``.

        Returns None when it failed, or when the champion has moved meanwhile.
        """
        published: list[Published] = []
        # Where nothing was stale and nothing ran, all is as it was when `collect` looked.
        seen = self._changes
        idle = seen is not None and not seen.stages and all(run.outcome == "cached" for run in self.runs.values())
        look = Look(graph, seen) if idle and seen is not None else None

        def body() -> State[Any]:
            try:
                published.append(publish(self.site.root, tell, self.site.root / self.site.log(PUBLISH), since, look))
            except ChampionMoved as error:
                return Completed(name="Skipped", message=str(error), data="skipped")
            except (UserMistake, TryAgain) as error:
                raise self._refused(PUBLISH, error) from None
            return Completed(name="Ran" if published[0].new else "Cached", data=published[0].version.name)

        self._run(PUBLISH, "Push the data, commit, push Git, register the version, promote it.", [*self.runs], body)
        return published[0] if published else None

    def stale(self) -> Collection[str]:
        """Returns the stages that are not up to date, now that ``collect`` has ended."""
        return (self._changes or self._look()).stages.keys()

    def _look(self) -> dvc.Changes:
        while True:
            try:
                return dvc.changes(self.site.root)
            except dvc_lock.Busy:
                # Somebody typed a DVC command meanwhile.
                dvc_lock.await_others(self.site.root, lambda line: None)

    def collect(self, graph: Graph, wanted: bool) -> None:
        """Copies what is new at the sources and versions it, unless a later stage was asked for."""
        # What an earlier pass saw is stale itself by now.
        self._changes = None

        def body() -> State[Any]:
            return (
                self._collect(graph) if wanted else Completed(name="Skipped", message="before --from", data="skipped")
            )

        self._run(COLLECT, "Copy what is new at the sources into data/raw and version it.", (), body)

    def step(self, step: Step) -> None:
        """Does with a stage what the plan says, or nothing when what it reads has failed."""
        stage = step.stage
        # Where training cannot start, no stage begins for nothing, although some do not read what it starts from.
        refused = INIT in self.runs and self.runs[INIT].stops_downstream and step.action == Action.RUN
        brought = [INIT] if INIT in self.runs and (stage.reads_init or refused) else []
        upstream = [*([COLLECT] if stage.reads_collected else []), *brought, *stage.upstream]
        if stage.reads_champion and step.action == Action.RUN and not self._missing(upstream):
            self._run(CHAMPION, "Fetch and version the model in production.", upstream, lambda: self._champion(stage))
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
            return self._repro(stage, step.force)

        if step.force and not missing and stage.name not in self._resumed.begun:
            # A forced stage computes everything anew; from its last checkpoint it would only write the result again.
            # Its retries do go on from theirs.
            self._forget_checkpoints(stage)
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

    def _collect(self, graph: Graph) -> State[Any]:
        root = self.site.root
        if (root / raw.POINTER).exists() and not (root / paths.RAW).exists():
            # Else what is gone at the sources by now would be left out of the next version without a word.
            self._restore_raw()
        if (root / init.POINTER).exists() and not (root / paths.INIT).exists():
            # As with the text: a checkpoint that has gone from where it was is still that of the project.
            self._ask_remote(COLLECT, dvc.checkout_command(root, self._params.publish.data_remote, init.POINTER))
        command = [sys.executable, "-m", "tasks.collect", "--relative-to", str(worktree.main(root))]
        self._execute(COLLECT, command, dvc.classify_stage)
        report = read_report(root)
        copied = {paths.RAW: (raw.POINTER, report.has_news)}
        if report.init is not None and any(stage.reads_init for stage in graph.stages):
            copied[paths.INIT] = (init.POINTER, report.init.state in ("new", "changed"))
        changes = None
        if not any(has_news or not (root / pointer).exists() for pointer, has_news in copied.values()):
            changes = self._look()
            if not any(str(pointer) in changes.data for pointer, _ in copied.values()):
                self._changes = changes
                return Completed(name="Cached", message="nothing new at the sources", data="cached")
        for folder, (pointer, has_news) in copied.items():
            if has_news or not (root / pointer).exists() or changes is None or str(pointer) in changes.data:
                self._execute(COLLECT, dvc.add_command(folder))
        return Completed(name="Ran", data="ran")

    def _restore_raw(self) -> None:
        self._ask_remote(COLLECT, dvc.checkout_command(self.site.root, self._params.publish.data_remote, raw.POINTER))
        if not (self.site.root / paths.RAW).exists():
            raise StageFailed(
                f"{raw.POINTER} names text that lies neither here nor in DVC's cache nor at a remote. Name the remote "
                f"that has it (`dvc remote add --default NAME PLACE`), or delete {raw.POINTER} to begin with what the "
                "sources have now.",
                False,
                EXIT_USER_MISTAKE,
            )

    def _init(self, graph: Graph, running: Collection[str]) -> State[Any]:
        root, wanted = self.site.root, self._params.train.init
        action = self._bring(
            INIT, paths.INIT, init.POINTER,
            lambda: init.look(root, wanted, graph, self._changes or self._look(), running),
            partial(remotely.bring_init, root, wanted),
        )  # fmt: skip
        try:
            self._params.check_start(root / paths.INIT)
        except UserMistake as error:
            raise self._refused(INIT, error) from None
        if action != champion.Action.KEEP:
            # What was seen is stale itself by now.
            self._changes = None
        nothing = action == champion.Action.BRING and read_init(root / paths.INIT).version is None
        if nothing and wanted == PREVIOUS:
            told = "no version is in production yet that training could go on from: it starts from scratch"
            self._watch.event(Event(INIT, "", 0, 0, "", 0, notice=told))
        return _brought(action, "from scratch" if nothing else None)

    def _champion(self, stage: Stage) -> State[Any]:
        root = self.site.root
        action = self._bring(
            CHAMPION, paths.CHAMPION, champion.POINTER,
            lambda: champion.look(root, stage.name, self._look()),
            partial(remotely.bring_champion, root),
        )  # fmt: skip
        nothing = action == champion.Action.BRING and read_champion(root / paths.CHAMPION).version is None
        return _brought(action, "no champion yet" if nothing else None)

    def _bring(
        self, name: str, folder: Path, pointer: Path,
        look: Callable[[], champion.Action], bring: Callable[[Path, float], None],
    ) -> champion.Action:  # fmt: skip
        """Does what ``look`` says about a ``folder`` that a version brings along, and returns what that was."""
        try:
            action = look()
            if action == champion.Action.BRING:
                bring(self.site.root / self.site.log(name), self._params.publish.stall_minutes)
        except (UserMistake, TryAgain) as error:
            raise self._refused(name, error, mendable=isinstance(error, TryAgain)) from None
        match action:
            case champion.Action.KEEP:
                failures.forget(self.site.root, name)
            case champion.Action.RESTORE:
                try:
                    self._ask_remote(name, dvc.pull_command(pointer))
                except StageFailed as error:
                    if error.mendable:
                        raise
                    told = " ".join(str(error).split()).rstrip(".?")
                    cure = f"delete {pointer}, and the next run brings what is in production now"
                    place = "name the remote that has it (`dvc remote add --default NAME PLACE`)"
                    message = f"{folder} is lost or edited, and cannot be had again ({told}): {place}, or {cure}."
                    raise StageFailed(message, False, EXIT_USER_MISTAKE) from None
            case champion.Action.BRING:
                self._execute(name, dvc.add_command(folder))
        return action

    def _refused(self, name: str, error: UserMistake | TryAgain, mendable: bool = False) -> StageFailed:
        """Remembers what ``name`` has met outside of any command, for `overnight status`; returns it as its failure."""
        remember(self.site, name, dvc.Result("failed", error.exit_code, str(error)))
        return StageFailed(str(error), mendable, error.exit_code)

    def _forget_checkpoints(self, stage: Stage) -> None:
        shutil.rmtree(self.site.root / paths.CHECKPOINTS / stage.name, ignore_errors=True)

    def _repro(self, stage: Stage, force: bool) -> State[Any]:
        result = self._execute(stage.name, dvc.repro_command(stage.name, force))
        if result.outcome == "ran":
            computed.note(self.site.root, stage.name)
        # DVC has the result now, so nobody will go on from there.
        self._forget_checkpoints(stage)
        artifacts.report(stage, self.site.root)
        return Completed(name=result.outcome.capitalize(), data=result.outcome)

    def _ask_remote(self, name: str, command: list[str]) -> dvc.Result:
        return self._execute(name, command, minutes=self._params.publish.stall_minutes)

    def _execute(
        self, name: str, command: list[str], classify: Classify = dvc.classify, minutes: float | None = None
    ) -> dvc.Result:
        with contextlib.closing(artifacts.ProgressArtifact(name)) as shown:

            def on_event(event: Event) -> None:
                self._watch.event(event)
                shown.update(event)

            result = execute(self.site, name, command, on_event, classify, minutes)
        if result.outcome == "failed":
            raise StageFailed(result.message, result.mendable, result.exit_code)
        return result


def _brought(action: champion.Action, nothing: str | None) -> State[Any]:
    if action == champion.Action.KEEP or nothing:
        return Completed(name="Cached", message=nothing or "unchanged", data="cached")
    return Completed(name="Ran", data="ran")


_OUTCOMES: Mapping[str, Outcome] = {"Ran": "ran", "Cached": "cached", "Skipped": "skipped"}
