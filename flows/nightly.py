"""The nightly flow: retrain in a worktree at a pinned commit, publish the version, tell how it went.

``overnight schedule`` and the deployments of ``deployments/prefect.yaml`` run it. The worktree and the record of the
run are named after the flow run's id: a retry of the same flow run, by Prefect's button or by ``overnight rerun``,
finds its half-done work and goes on there.
"""

import contextlib
import dataclasses
import os
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.states import Completed, Failed
from rich.console import Console

from flows import dvc, dvc_fork, gate, lease, lock, lost, notice, pin, project, publish, running, runs, worktree
from flows.execute import LOGS, Site
from flows.git import commit_of
from flows.graph import Graph
from flows.overnight import Night
from flows.ownership import others_are_told
from flows.terminal import Terminal
from flows.watch import All, exit_code
from tasks import atomic
from tasks.errors import TryAgain, UserMistake
from tasks.notice_params import Kind
from tasks.params import Params

# Whoever runs a night imports this module before Prefect's engine asks for the lease.
lease.make_dispensable()

# Another machine may promote a champion while this one measures, again and again in theory.
_MOST_MEASUREMENTS = 3
_LAST_LINES = 15


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a night ended; ``reason`` is one line. ``stage`` is the one that failed, ``log`` what that has said.

    ``exit_code``: as :class:`flows.runs.Run` has it.
    """

    kind: Kind
    reason: str
    version: str | None = None
    stage: str | None = None
    log: Path | None = None
    exit_code: int | None = None

    @property
    def state(self) -> State[Any]:
        """The state of the flow run."""
        if self.kind == "failure":
            return Failed(message=f"{self.stage}: {self.reason}" if self.stage else self.reason)
        return Completed(name=_STATE_NAMES[self.kind], message=self.reason)

    @property
    def recorded(self) -> runs.State:
        """The state in the record of the run."""
        return _RECORDED[self.kind]


_STATE_NAMES: dict[Kind, str] = {
    "success": "Completed",
    "unchanged": "Nothing new",
    "refused": "Refused",
    "skipped": "Skipped",
}
_RECORDED: dict[Kind, runs.State] = {
    "success": "completed",
    "unchanged": "unchanged",
    "refused": "refused",
    "skipped": "skipped",
    "failure": "failed",
}


def name_of(root: Path, flow_run: FlowRun) -> str:
    """Returns the run's name: the time it was planned for, and the beginning of its id.

    One that has begun keeps its name, also when it goes on where the clock shows another time.
    """
    if (begun := runs.of_flow_run(root, str(flow_run.id))) is not None:
        return begun.run
    planned = (flow_run.expected_start_time or datetime.now(UTC)).astimezone()
    return f"{planned:%Y%m%d-%H%M%S}-{flow_run.id.hex[:8]}"


def _name() -> str:
    context = FlowRunContext.get()
    assert context is not None
    return name_of(Path((context.parameters or {}).get("project") or Path.cwd()), _flow_run())


@flow(name="nightly", flow_run_name=_name, persist_result=False, log_prints=False)
def nightly(
    from_stage: str | None = None, force: bool = False, scratch: bool = False, project: str | None = None
) -> State[Any]:
    """Retrains the model of the project in the folder ``project`` (None: the current one) and publishes the version.

    ``from_stage`` skips the stages before it; ``force`` repeats stages that are unchanged, ``scratch`` all of them.
    """
    with contextlib.chdir(project or Path.cwd()):
        return _night(_flow_run(), None if scratch else from_stage, force or scratch)


def _flow_run() -> FlowRun:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    return context.flow_run


def _night(flow_run: FlowRun, from_stage: str | None, force: bool) -> State[Any]:
    name = name_of(Path.cwd(), flow_run)
    try:
        root = project.find()
    except UserMistake as error:
        # Nowhere to keep a record.
        return _tell_nowhere(name, str(error))
    known = {"flow_run": str(flow_run.id), "night": True, "from_stage": from_stage, "force": force}
    begun = runs.recall(root, name) is not None
    with Terminal(Console(stderr=True)) as terminal, runs.attempt(root, name, **known) as record:
        try:
            with atomic.disk_full_is_told(root), others_are_told(root):
                outcome = _in_turn(root, flow_run, begun, record, terminal)
        except (UserMistake, TryAgain) as error:
            outcome = Outcome("failure", str(error), exit_code=error.exit_code)
        except Exception as error:
            # A bug of ours, or the world's: it is a night that failed, and that is told.
            outcome = _bug(root, name, error)
        record.set(exit_code=outcome.exit_code)
        record.end(outcome.recorded, outcome.reason, outcome.version)
        terminal.say(f"{name}: {outcome.state.name}: {outcome.reason}")
        told = notice.tell(_notice(root, record.run, outcome), project.notice(root))
        record.set(told=True)
        terminal.say(f"notice {told}")
    return outcome.state


def _tell_nowhere(name: str, reason: str) -> State[Any]:
    notice.tell(notice.Notice("failure", Path.cwd().name, name, reason), project.notice(Path.cwd()))
    return Failed(message=reason)


def _in_turn(root: Path, flow_run: FlowRun, begun: bool, record: runs.Record, terminal: Terminal) -> Outcome:
    """Does the night once no other run is at work; or skips it, when that is too late."""
    params = project.committed(root)
    name = record.run.run

    def wait(line: str) -> None:
        record.set(reason=line)
        terminal.say(line)

    if (skipped := _too_late(flow_run, begun, params)) is not None:
        return skipped
    with lock.hold(root, name, wait=True, tell=wait) as descriptor, running.record(root, name) as now:
        # The other may have taken hours.
        if (skipped := _too_late(flow_run, begun, params)) is not None:
            return skipped
        record.set(reason="")
        # Nobody else works here now.
        lost.settle(root, params.notice, but=name)
        return _attempt(root, params, record, descriptor, All(record, now, terminal), terminal, now)


def _too_late(flow_run: FlowRun, begun: bool, params: Params) -> Outcome | None:
    late = lateness(flow_run, begun)
    if late <= timedelta(minutes=params.flow.skip_when_late_minutes):
        return None
    return Outcome("skipped", f"{_words(late)} late, more than params.yaml's flow.skip_when_late_minutes")


def _bug(root: Path, name: str, error: Exception) -> Outcome:
    log = root / LOGS / name / "night.log"
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write("".join(traceback.format_exception(error)))
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome("failure", message, log=log if log.is_file() else None)


def lateness(flow_run: FlowRun, begun: bool) -> timedelta:
    """Returns how long after its time the first attempt at ``flow_run`` starts; later attempts are never late."""
    if begun or flow_run.run_count > 1 or flow_run.expected_start_time is None:
        return timedelta()
    return datetime.now(UTC) - flow_run.expected_start_time


def _attempt(
    project_root: Path,
    params: Params,
    record: runs.Record,
    descriptor: int,
    watch: All,
    terminal: Terminal,
    now: running.Record,
) -> Outcome:
    name = record.run.run
    # It takes as long to import DVC as to make the worktree.
    dvc_fork.prepare(dvc.environment(os.environ))
    root = _worktree(project_root, params, record)
    site = Site(root, name, descriptor, project_root)
    with contextlib.chdir(root):
        night = Night(site, project.parameters(root), watch, record.resumed)
        graph = dvc.graph(root)
        now.plan(graph.names())
        outcome = _work(night, graph, record, terminal) if night.checkout() else _failure(night)
    if outcome.kind != "failure":
        # Whoever repeats this run finds the version that it has made, and does not make another of the same model.
        record.set(commit=commit_of(root, "HEAD"), version=outcome.version)
        worktree.remove(project_root, name)
        record.set(worktree=None)
    return outcome


def _worktree(root: Path, params: Params, record: runs.Record) -> Path:
    name = record.run.run
    if record.run.commit is None:
        place = pin.worktree_of(root, name, params.publish)
        record.set(commit=commit_of(place, "HEAD"), worktree=place.relative_to(root.resolve()))
        return place
    return worktree.add(root, name, record.run.commit)


def _work(night: Night, graph: Graph, record: runs.Record, terminal: Terminal) -> Outcome:
    for _ in range(_MOST_MEASUREMENTS):
        night.work(graph, record.run.from_stage, record.run.force)
        if night.failed:
            return _failure(night)
        published = night.publish(terminal.say, record.run.commit, graph)
        if night.failed:
            return _failure(night)
        if published is not None:
            return _published(night, published)
        # Another version was promoted meanwhile: measure once more, against that one.
    return Outcome("failure", f"the champion moved {_MOST_MEASUREMENTS} times while this model was measured")


def _failure(night: Night) -> Outcome:
    failed = night.failed[0]
    log, code = night.site.root / night.site.log(failed.stage), exit_code(night.failed)
    return Outcome("failure", failed.message, None, failed.stage, log if log.is_file() else None, code)


def _published(night: Night, published: publish.Published) -> Outcome:
    version, reasons = published.version.name, "; ".join(published.reasons)
    if not published.new and not published.promoted:
        return Outcome("unchanged", reasons, version)
    if published.promoted:
        return Outcome("success", "; ".join(filter(None, [f"{version} is in production", reasons])), version)
    refused = not gate.read_gate(night.site.root).passed
    return Outcome("refused" if refused else "success", f"{version} is not promoted: {reasons}", version)


def _notice(root: Path, run: runs.Run, outcome: Outcome) -> notice.Notice:
    lines = outcome.log.read_text(errors="replace").splitlines()[-_LAST_LINES:] if outcome.log else []
    return notice.Notice(
        kind=outcome.kind,
        project=root.name,
        run=run.run,
        message=outcome.reason,
        stage=outcome.stage,
        last_lines=tuple(lines),
        command=f"overnight rerun {run.run}" if outcome.kind == "failure" else None,
        version=outcome.version,
        flow_run=run.flow_run,
    )


def _words(late: timedelta) -> str:
    minutes = round(late.total_seconds() / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
