"""Flow runs of Prefect: a new one, or one more attempt at one that did not come to its end."""

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.flow_engine import run_flow
from prefect.states import Pending

from flows import dvc, dvc_fork
from tasks.errors import TryAgain


class ServerGone(TryAgain):
    """Prefect's server went away in the middle of a run, and Prefect's client has waited for it in vain."""


def import_ahead() -> None:
    """Imports what a run needs when it starts, for a process that has nothing to do but wait for its server."""
    # A process of its own, on another core.
    dvc_fork.prepare(dvc.environment(os.environ))
    for name in ("dvc.repo", "fastapi", "prefect.task_engine", "prefect.utilities.visualization"):
        importlib.import_module(name)


def start(flow: Flow[..., State[Any]], flow_run: str | None, **parameters: Any) -> State[Any]:
    """Runs ``flow`` in this process and returns its final state. Raises :class:`ServerGone`.

    With ``flow_run`` it is one more attempt at the flow run of that id, or a new one where the server knows none.
    """
    with _told():
        if flow_run is None:
            return flow(**parameters, return_state=True)
        with get_client(sync_client=True) as client:
            try:
                # Not AwaitingRetry, as Prefect's button has it: a runner would start it a second time.
                client.set_flow_run_state(UUID(flow_run), Pending(name="Retrying"), force=True)
                known = client.read_flow_run(UUID(flow_run))
            except ObjectNotFound:
                return flow(**parameters, return_state=True)
        state = run_flow(flow, flow_run=known, parameters=parameters, return_type="state")
        assert isinstance(state, State)
        return state


def is_known(flow_run: str) -> bool:
    """Whether the server knows the flow run of that id."""
    with _told(), get_client(sync_client=True) as client:
        try:
            client.read_flow_run(UUID(flow_run))
        except ObjectNotFound:
            return False
    return True


@contextlib.contextmanager
def _told() -> Iterator[None]:
    # Prefect's workers of logs and events complain on stderr about every batch that they cannot deliver.
    logging.raiseExceptions = False
    try:
        yield
    except httpx.TransportError as error:
        raise ServerGone(
            f"Prefect's server at {os.environ['PREFECT_API_URL']} went away ({error}). What was done until here is "
            "kept; when the server is back, `overnight rerun` ends this run."
        ) from None
