"""``overnight run``: checks, the lock, a server, the flow, and what is said about it."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from flows import dvc, lock, project, server, summary
from flows.execute import Site
from flows.graph import Graph
from tasks.params import Params
from tasks.progress import Event, Sink, sink_for

if TYPE_CHECKING:
    # Importing it imports Prefect, which must wait for the server's settings.
    from flows.overnight import StageRun

EXIT_FAILED = 1
EXIT_TERMINATED = 143
_LAST_LINES = 15


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for."""

    from_stage: str | None = None
    force: bool = False
    wait: bool = False


def run(request: Request, out: Console, err: Console) -> int:
    """Runs the project in the current folder and returns the exit code: 0, 1 when a stage failed, 143 when terminated.

    Raises :class:`tasks.errors.UserMistake` before anything runs, :class:`flows.lock.Held` when another run is at work.
    """
    try:
        with _sigterm_raises():
            return _checked(request, out, err)
    except _Terminated:
        err.print("terminated; `overnight run` goes on where this run stopped.")
        return EXIT_TERMINATED


def _checked(request: Request, out: Console, err: Console) -> int:
    root = project.find()
    params = project.parameters(root)
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    with lock.hold(root, name, request.wait, tell=lambda line: err.print(escape(line))) as descriptor:
        site = Site(root, name, descriptor)
        with server.serve(root, descriptor) as serving:
            # Reading the graph takes a second, in which the server starts.
            graph = dvc.graph(root)
            if request.from_stage is not None:
                graph.check(request.from_stage, "--from")
            for stage in params.flow.retries:
                graph.check(stage, "params.yaml: flow.retries")
            return _run(site, graph, params, request, serving, out, err)


class _Terminated(BaseException):
    """SIGTERM arrived. No :class:`Exception`, so that nothing on the way takes it for a fault of its own."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Makes SIGTERM leave every ``with`` block in order. Prefect's own handler ends with a call of this one."""

    def terminate(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(
    site: Site, graph: Graph, params: Params, request: Request, serving: server.Server, out: Console, err: Console
) -> int:
    started = time.monotonic()
    from flows.overnight import make_flow

    terminal = Terminal(err)
    flow = make_flow(site, graph, params, terminal)
    serving.wait()
    try:
        with terminal:
            state = flow(request.from_stage, request.force, return_state=True)
    finally:
        _flush()
    summary.show_stages(out, [_line(one) for one in terminal.runs], time.monotonic() - started)
    for one in terminal.runs:
        if one.outcome == "failed":
            _show_failure(err, site, one)
    if state.is_completed():
        out.print()
        summary.show_model(out, site.root)
        return 0
    if not any(one.outcome == "failed" for one in terminal.runs):
        err.print(f"[bold red]error:[/] {escape(state.message or 'the flow failed')}")
    return EXIT_FAILED


def _line(run: "StageRun") -> summary.StageLine:
    return summary.StageLine(stage=run.stage, outcome=run.outcome, seconds=run.seconds, message=run.message)


def _show_failure(err: Console, site: Site, run: "StageRun") -> None:
    err.print(f"\n[bold red]error:[/] {escape(f'{run.stage}: {run.message}')}", soft_wrap=True)
    log = site.log(run.stage)
    if (site.root / log).is_file():
        lines = (site.root / log).read_text(errors="replace").splitlines()
        # Where the message is all that the stage said, repeating it helps nobody.
        for line in lines[-_LAST_LINES:]:
            err.print(f"  {escape(line)}", style="dim", soft_wrap=True, highlight=False)
        err.print(f"The whole log: {log}", soft_wrap=True)
    err.print("Go on with: overnight run", soft_wrap=True)


def _flush() -> None:
    """Hands Prefect's last logs and events to the server, which is about to end; later they would be complaints."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    with contextlib.suppress(Exception):
        APILogWorker.drain_all(timeout=5)
    with contextlib.suppress(Exception):
        EventsWorker.drain_all()


class Terminal:
    """Follows a run on the terminal: a bar or lines while a stage works, one line when it has ended."""

    def __init__(self, err: Console) -> None:
        self._err = err
        self._sink: Sink | None = None
        self.runs: list[StageRun] = []

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def event(self, event: Event) -> None:
        if self._sink is None:
            self._sink = sink_for(self._err)
        self._sink.show(event)

    def retrying(self, stage: str, message: str, attempt: int, seconds: float) -> None:
        self._close()
        self._err.print(
            f"{stage:<9} {escape(message)}; attempt {attempt} starts in {seconds:g} s", soft_wrap=True, highlight=False
        )

    def ended(self, run: "StageRun") -> None:
        self._close()
        self.runs.append(run)
        self._err.print(
            f"{run.stage:<9} {run.outcome}" + (f"  {run.seconds:,.1f} s" if run.outcome == "ran" else ""),
            highlight=False,
        )

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None
