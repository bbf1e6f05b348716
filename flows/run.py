"""``overnight run``: checks, the lock, a server, the flow, and what is said about it."""

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from flows import dvc, dvc_lock, lock, project, running, runs, server, summary
from flows.execute import Site
from flows.graph import Graph
from flows.terminal import Terminal, print_line, speaker
from flows.termination import EXIT_INTERRUPTED, sigterm_raises
from flows.watch import All, StageRun, exit_code
from tasks import paths
from tasks.errors import EXIT_USER_MISTAKE
from tasks.params import Params
from tasks.stage import importing

_LAST_LINES = 15
# What DVC writes around the output of every stage, and what ours has told already.
_DVC_SAYS = re.compile(r"\s*$|Running stage '|> |ERROR: failed to reproduce '")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for. ``again``: the run to go on with, instead of a new one."""

    from_stage: str | None = None
    force: bool = False
    wait: bool = False
    again: runs.Run | None = None


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A run that has the lock, and whose graph and parameters fit what was asked for."""

    request: Request
    site: Site
    graph: Graph
    params: Params
    record: running.Record


def run(request: Request, out: Console, err: Console) -> int:
    """Runs the project in the current folder and returns the exit code: 0, 1 when a stage failed, 130 when interrupted.

    Raises :class:`tasks.errors.UserMistake` before anything runs, :class:`flows.lock.Held` when another run is at work.
    """
    root = project.find()
    name = request.again.run if request.again else f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"

    def tell(how: str) -> None:
        known = runs.recall(root, name)
        if known is not None and known.pid == os.getpid():
            speaker(err)(f"{how}; `overnight rerun` goes on where this run stopped.")
        else:
            # `overnight rerun` knows nothing of it, and would take the run before.
            speaker(err)(f"{how} before the run had begun. Run the same command again.")

    with sigterm_raises(lambda: tell("terminated")):
        try:
            return _check_and_run(request, root, name, out, err)
        except KeyboardInterrupt:
            tell("interrupted")
            return EXIT_INTERRUPTED


def _check_and_run(request: Request, root: Path, name: str, out: Console, err: Console) -> int:
    params = project.parameters(root)
    advice = f"Wait until it has ended, or run `overnight {'rerun' if request.again else 'run'} --wait`."
    held = lock.hold(root, name, request.wait, tell=speaker(err), advice=advice)
    with held as descriptor, running.record(root, name) as record:
        dvc_lock.mend(root)
        if request.wait:
            dvc_lock.await_others(root, speaker(err))
        else:
            dvc_lock.check_others(root, advice)
        site = Site(root, name, descriptor)
        with server.serve(root, descriptor) as serving:
            # Reading the graph takes a second, in which the server starts.
            graph = dvc.graph(root)
            if request.from_stage is not None:
                graph.check(request.from_stage, "--from")
                graph.check_there(request.from_stage, root)
            for stage in params.flow.retries:
                graph.check(stage, "params.yaml: flow.retries")
            record.plan(graph.names())
            return _run(_Checked(request, site, graph, params, record), serving, out, err)


def _run(checked: _Checked, serving: server.Server, out: Console, err: Console) -> int:
    started, request, site = time.monotonic(), checked.request, checked.site
    with importing():
        # It imports Prefect, which must wait for the server's settings.
        from flows import flow_runs
        from flows.overnight import make_flow

        flow_runs.import_ahead()
    terminal = Terminal(err)
    known = {"from_stage": request.from_stage, "force": request.force}
    digest = hashlib.sha256((site.root / paths.PARAMS).read_bytes()).hexdigest()
    with runs.attempt(site.root, site.run, **known, params=digest) as kept:
        flow = make_flow(site, checked.graph, checked.params, All(checked.record, kept, terminal), kept)
        serving.wait()
        if not err.is_terminal:
            terminal.say(f"run {site.run} {'goes on' if request.again else 'starts'} in {site.root}")
        if request.again and request.again.params not in (None, digest):
            what = "what reads the changed values runs anew"
            if request.from_stage is not None:
                what += f", from {request.from_stage} on"
            terminal.say(f"{paths.PARAMS} was changed since this run stopped: {what}")
        try:
            with terminal, serving.settings():
                state = flow_runs.start(flow, kept.run.flow_run, **known)
        finally:
            flush()
        serving.let_go()
        fault = None if state.is_completed() else state.message or ""
        kept.end("completed" if fault is None else "failed", fault or "")
    seconds = time.monotonic() - started
    _show_end(site, terminal.runs, seconds, fault, out, err)
    if not err.is_terminal:
        gate = summary.read_evaluation(site.root).gate if fault is None else None
        verdict = "" if gate is None or gate.passed else "; the gate REFUSED this model"
        how = "completed" if fault is None else "failed"
        terminal.say(f"run {site.run} ends: {how} in {seconds:,.0f} s{verdict}")
    return 0 if fault is None else exit_code(_failed(terminal.runs))


def _show_end(
    site: Site, stages: Sequence[StageRun], seconds: float, fault: str | None, out: Console, err: Console
) -> None:
    """Shows how the ``stages`` of a run ended, and what came of it; ``fault`` is None where all went well."""
    if out.is_terminal or not _same_place(out, err):
        # In one log both ends of the run would list them.
        summary.show_stages(out, [_line(one) for one in stages], seconds)
    for one in _failed(stages):
        _show_failure(err, site, one)
    if fault is None:
        out.print()
        summary.show_model(out, site.root)
    elif not _failed(stages):
        print_line(err, f"error: {fault or 'the flow failed'}")


def _failed(stages: Sequence[StageRun]) -> list[StageRun]:
    return [one for one in stages if one.outcome == "failed"]


def _same_place(out: Console, err: Console) -> bool:
    try:
        places = [os.fstat(console.file.fileno()) for console in (out, err)]
    except (OSError, ValueError):
        # Not a file at all.
        return False
    return os.path.samestat(*places)


def _line(run: StageRun) -> summary.StageLine:
    return summary.StageLine(stage=run.stage, outcome=run.outcome, seconds=run.seconds, message=run.message)


def _show_failure(err: Console, site: Site, run: StageRun) -> None:
    def show(line: str, style: str | None = None) -> None:
        print_line(err, line, style)

    show(f"error: {run.stage}: {run.message}", "bold red")
    log = site.log(run.stage)
    if (site.root / log).is_file():
        # A mistake is told in full by its one line; what other processes of the stage said when it ended is noise then.
        lines = [] if run.exit_code == EXIT_USER_MISTAKE else (site.root / log).read_text(errors="replace").splitlines()
        for line in _worth_showing(lines, run.message):
            show(f"  {line}", "dim")
        show(f"The whole log: {log}")
    first = "Change that first, then go" if run.exit_code == EXIT_USER_MISTAKE else "Go"
    show(f"{first} on with: overnight rerun {site.run}")


def _worth_showing(log: list[str], message: str) -> list[str]:
    """Returns the last lines of a failed stage's log but for what frames them, and for ``message``, which was told."""
    told = [line for line in log if not _DVC_SAYS.match(line) and line.removeprefix("error: ").strip() != message]
    return told[-_LAST_LINES:]


def flush() -> None:
    """Hands Prefect's last logs and events to the server, which is about to end; later they would be complaints."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    with contextlib.suppress(Exception):
        APILogWorker.drain_all(timeout=5)
    with contextlib.suppress(Exception):
        EventsWorker.drain_all()
