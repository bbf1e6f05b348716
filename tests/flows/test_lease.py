"""The lease of a night's concurrency slot, when Prefect's server does not renew it."""

import inspect
import threading
import uuid

import pytest
from prefect import flow_engine
from prefect.concurrency import _leases

from flows import nightly


def test_the_name_by_which_prefects_engine_asks_for_a_lease_is_the_one_that_is_replaced() -> None:
    assert "maintain_concurrency_lease(" in inspect.getsource(flow_engine.FlowRunEngine)


def test_a_night_goes_on_when_the_lease_of_its_slot_cannot_be_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nightly.nightly.name == "nightly"
    asked = threading.Event()

    def fail(*_: object) -> None:
        asked.set()
        raise ConnectionError("refused")

    monkeypatch.setattr(_leases, "_lease_renewal_loop", fail)
    lease = uuid.uuid4()
    # As Prefect's engine asks for it.
    with flow_engine.maintain_concurrency_lease(lease, 300, raise_on_lease_renewal_failure=True):
        asked.wait(10)
        for thread in threading.enumerate():
            if str(lease) in thread.name:
                thread.join(10)
        # Where it is cancelled, this is interrupted.
        threading.Event().wait(1)
