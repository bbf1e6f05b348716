"""Flow runs whose process died without a word: Prefect would call them Running for ever, their slot taken.

Who is dead is known by whoever asks (:mod:`flows.lost`): ``overnight schedule`` holds a lock that no night of an
earlier one outlives, and the record of a run says whether it is alive.
"""

from collections.abc import Iterable
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

# The states of a run that some process should be working on.
_AT_WORK = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def unfinished(client: SyncPrefectClient, deployment: UUID) -> list[UUID]:
    """Returns the flow runs of the deployment that the server believes to be at work."""
    found = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_AT_WORK))),
    )
    return [run.id for run in found]


def mark(client: SyncPrefectClient, flow_runs: Iterable[UUID], message: str, name: str = "Crashed") -> list[str]:
    """Makes each of the flow runs crashed (cancelled, when it was being cancelled), with ``message``.

    ``name`` is what Prefect's UI calls the state, and what automations match. Returns the names of those that were
    still thought to be at work; the others, and those that the server does not know, are left as they are. Their
    concurrency slots are free afterwards, and they can be retried.
    """
    marked = []
    for flow_run in flow_runs:
        try:
            run = client.read_flow_run(flow_run)
        except ObjectNotFound:
            continue
        if run.state_type not in _AT_WORK:
            continue
        was_cancelling = run.state_type == StateType.CANCELLING
        state: State[None] = Cancelled(message=message) if was_cancelling else Crashed(name=name, message=message)
        # Not forced: only a proposal passes the rules that give the slot back.
        client.set_flow_run_state(flow_run, state)
        marked.append(run.name)
    return marked


def free_slots(client: SyncPrefectClient, deployment: UUID) -> bool:
    """Frees the deployment's concurrency slots when no run of it is at work; returns whether any was taken.

    A server that was killed may have forgotten whose slot it was (prefect keeps leases apart from the count).
    """
    limit = client.read_deployment(deployment).global_concurrency_limit
    if limit is None or not limit.active_slots or unfinished(client, deployment):
        return False
    client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=0))
    return True
