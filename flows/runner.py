"""The runner of ``overnight schedule``: ``python -m flows.runner NAME CRON TIMEZONE`` in the project's folder.

It puts the deployment NAME of the nightly flow on the Prefect server of PREFECT_API_URL and runs what is due, each
night in an interpreter of its own, which reads the code as it is then.
"""

import asyncio
import functools
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from prefect import Flow
from prefect._internal.observers import FlowRunCancellingObserver
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.runner._scheduled_run_poller import ScheduledRunPoller
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from flows import automations, crashed, lost, project, server
from flows.schedule import STARTED, Started
from flows.termination import EXIT_TERMINATED
from flows.timetable import Timetable
from tasks import atomic
from tasks.errors import TryAgain, UserMistake

# What a runner asks its server again and again.
_ASKING = (
    (ScheduledRunPoller, "_get_and_submit_flow_runs"),
    (FlowRunCancellingObserver, "_check_for_cancelled_flow_runs"),
)


def main(name: str, times: Timetable) -> None:
    """Serves until a signal ends the process."""
    from flows.nightly import nightly

    root = Path.cwd()
    params = project.notice(root)
    runner = _Runner(name=name, pause_on_shutdown=False)
    with get_client(sync_client=True) as client:
        paused = _is_paused(client, f"{nightly.name}/{name}")
        runner.add_deployment(make_deployment(nightly, name, times, root, paused))
        deployment_id = client.read_deployment_by_name(f"{nightly.name}/{name}").id
        # The schedule's lock is ours, so nothing that an earlier schedule started is alive; `overnight rerun` may be.
        unfinished = crashed.unfinished(client, deployment_id)
        if server.standing(root):
            automations.install(client, root, params)
        dead = lost.settle(root, params, unfinished)
        crashed.free_slots(client, deployment_id)
    atomic.write_json(root / STARTED, Started(paused=paused, crashed=dead).model_dump())
    asyncio.run(runner.start())


def make_deployment(
    nightly: Flow[..., Any], name: str, times: Timetable, root: Path, paused: bool = False
) -> RunnerDeployment:
    """Returns the deployment ``name`` of the flow: its schedule, and one night at a time.

    A night that comes while another is at work waits for it (ENQUEUE): a retry from Prefect's UI would otherwise be
    cancelled by it, and a slot that a dead run holds until its lease ends would cost the next night. What has waited
    too long is skipped by the flow itself, so nothing piles up.
    """
    return RunnerDeployment.from_flow(
        nightly,
        name=name,
        schedule=Cron(times.cron, timezone=times.timezone),
        paused=paused,
        parameters={"project": str(root)},
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        entrypoint_type=EntrypointType.MODULE_PATH,
        tags=["overnight"],
    )


def _is_paused(client: SyncPrefectClient, name: str) -> bool:
    """Whether somebody has paused the deployment in Prefect's UI, which a new start must not undo."""
    try:
        known = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return False
    return known.paused or any(not schedule.active for schedule in known.schedules)


class _Runner(Runner):
    """A runner that outlives its server's absence, starts nothing after SIGTERM, and ends when the nights have ended.

    They are told by the supervisor, which tells all that descends from it. Prefect's own handler would cancel them, and
    wait for each up to half a minute.
    """

    async def __aenter__(self) -> Self:
        # Prefect's loops end the runner, and the nights at work with it, or the watch for cancelled ones, when three
        # questions in a row have found no server: in some minutes. Where a server has no websockets, that watch begins
        # within Prefect's own __aenter__.
        for kind, name in _ASKING:
            setattr(kind, name, _patient(getattr(kind, name)))
        return await super().__aenter__()

    def handle_sigterm(self, *args: Any, **kwargs: Any) -> None:
        self.stopping = self._scheduled_run_poller.stopping = True
        # In a thread: the loop goes on meanwhile, because a night whose output nobody reads dies before it has told
        # the server how it ended.
        threading.Thread(target=_exit_after_children, daemon=True).start()


def _patient(ask: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """Returns the method ``ask`` as a question that is left for the next time where no server answers."""

    away = False

    # Prefect's loops name what they run.
    @functools.wraps(ask)
    async def asked(one: Any) -> None:
        nonlocal away
        try:
            await ask(one)
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error:
                raise
            if not away:
                told = str(error) or type(error).__name__
                print(
                    f"{datetime.now():%H:%M:%S} Prefect's server does not answer ({told}); it is asked until it does."
                )
            away = True
        else:
            if away:
                print(f"{datetime.now():%H:%M:%S} Prefect's server answers again.")
            away = False

    return asked


def _exit_after_children() -> None:
    while psutil.Process().children():
        time.sleep(0.05)
    os._exit(EXIT_TERMINATED)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Timetable(sys.argv[2], sys.argv[3]))
    except (UserMistake, TryAgain) as error:
        # `overnight schedule` reads it in the log.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
