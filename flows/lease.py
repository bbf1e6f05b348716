"""The lease of a night's concurrency slot on the Prefect server: a night goes on without it where it is lost.

Prefect ends a run whose lease it cannot renew: after some minutes without a server, after a restart of one that keeps
leases in memory, or when the machine has slept longer than the lease lasts. All that Prefect wants to prevent by that,
two nights at work in one project, its lock prevents.
"""

from contextlib import AbstractContextManager
from uuid import UUID

from prefect import flow_engine
from prefect.concurrency._leases import maintain_concurrency_lease


def make_dispensable() -> None:
    """Has flows that this process runs from now on keep their lease as long as they can, and go on without it."""
    vars(flow_engine)["maintain_concurrency_lease"] = _keep


def _keep(lease: UUID, seconds: float, **_: object) -> AbstractContextManager[None]:
    # Prefect has logged already that it cannot be renewed.
    return maintain_concurrency_lease(lease, seconds, suppress_warnings=True)
