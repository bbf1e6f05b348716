"""``overnight schedule`` on one machine: it starts nights, survives being killed, and ends with all that it started.

The night itself is a stand-in that does nothing for as long as a file is there: what a real one does is told elsewhere.
"""

import json
import re
import sqlite3
import time
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import page
from chain import Chain, Running
from prefect_server import ask
from receiver import Receiver, receiving

from flows import runs

_NIGHT = """
import time
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed


@flow(name="nightly", persist_result=False)
def nightly(project: str | None = None) -> State:
    Path(project, "at-work").touch()
    while Path(project, "hold").exists():
        time.sleep(0.05)
    return Completed(message="nothing to do")
"""
_SECONDS_TO_START = 60


def test_after_a_power_cut_the_dead_night_is_marked_and_told_and_does_not_block_the_next_one(fresh: Chain) -> None:
    (fresh.root / "flows" / "nightly.py").write_text(_NIGHT)
    (fresh.root / "hold").touch()
    with receiving() as receiver:
        # By the clock: nobody starts this night.
        schedule = _start(fresh, receiver, "schedule", "--cron", "* * * * *")
        killed = schedule.started_by_itself()
        schedule.wait_for_state(killed, "RUNNING")
        _cut_power(fresh)

        schedule = _start(fresh, receiver)
        name = schedule.read(f"flow_runs/{killed}")["name"]
        # This night keeps no record that a rerun could go on with.
        assert f"Run {name} had died without a word. It is marked as crashed; {runs.UNBEGUN}." in schedule.said()
        assert schedule.wait_for_state(killed, "CRASHED")["state"]["message"].startswith(
            "Its process died without a wo"
        )
        deployment = schedule.read("deployments/name/nightly/nightly")
        assert deployment["global_concurrency_limit"]["active_slots"] == 0
        assert [one["schedule"]["cron"] for one in deployment["schedules"]] == ["0 2 * * *"]
        _check_next_start(schedule)
        _check_message(receiver, name)
        # A page from elsewhere in a browser on this machine can neither ask nor change anything.
        strangers = ({"Origin": "https://pages.example"}, {"Host": "pages.example"}, {"Origin": "null"})
        assert [schedule.status(headers) for headers in strangers] == [403, 400, 403]
        assert schedule.status({"Origin": schedule.page}) == 200
        databases = list((fresh.root / ".overnight/prefect").glob("prefect.db*"))
        assert databases
        assert not any(file.stat().st_mode & 0o077 for file in databases)

        # Only one serves a project, and says so in one line.
        second = fresh.overnight("schedule")
        assert (second.code, "another `overnight schedule` (process" in second.complaint()) == (2, True)

        at_work = schedule.trigger()
        schedule.wait_for_state(at_work, "RUNNING")
        waiting = schedule.trigger()
        assert schedule.wait_for_state(waiting, "SCHEDULED", "AwaitingConcurrencySlot")
        (fresh.root / "hold").unlink()
        schedule.wait_for_state(at_work, "COMPLETED")

        (fresh.root / "hold").touch()
        stopped = schedule.trigger()
        schedule.wait_for_state(stopped, "RUNNING")
        schedule.running.process.terminate()
        ended = schedule.running.end()
        assert fresh.seconds_until_empty() < 1
    assert ended.code == 143, ended.err
    assert "Traceback" not in ended.out + ended.err
    assert _kept_state(fresh, stopped) == "Crashed"


class Schedule:
    """An ``overnight schedule`` at work, and its server."""

    def __init__(self, running: Running, chain: Chain) -> None:
        self.running, self._chain = running, chain
        running.wait_until(lambda: "Runs and their logs" in running.said() or running.process.poll() is not None)
        assert running.process.poll() is None, running.end()
        self.page = re.findall(r"Runs and their logs: (\S+)", self.said())[0]
        self._api = f"{self.page}/api"

    def said(self) -> str:
        return self.running.said()

    def read(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return ask(self._api, path, body)

    def status(self, headers: dict[str, str]) -> int:
        """Returns how the server answers what a browser asks for a page."""
        return httpx.post(f"{self._api}/deployments/filter", headers=headers, json={}).status_code

    def trigger(self) -> str:
        """Starts a night as the button in Prefect's UI does; returns the flow run's id."""
        deployment = self.read("deployments/name/nightly/nightly")["id"]
        return str(self.read(f"deployments/{deployment}/create_flow_run", {})["id"])

    def started_by_itself(self) -> str:
        """Returns the id of the first flow run that has begun."""
        deadline = time.monotonic() + 2 * _SECONDS_TO_START
        wanted = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
        while not (found := self.read("flow_runs/filter", wanted)):
            assert time.monotonic() < deadline, self._log()
            time.sleep(0.2)
        return str(found[0]["id"])

    def wait_for_state(self, flow_run: str, state: str, name: str | None = None) -> Any:
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            found = self.read(f"flow_runs/{flow_run}")
            if found["state_type"] == state and name in (None, found["state_name"]):
                return found
            assert time.monotonic() < deadline, (found["state"], self._log())
            time.sleep(0.1)

    def _log(self) -> str:
        return (self._chain.root / ".overnight/logs/schedule.log").read_text()


def _cut_power(chain: Chain) -> None:
    """Kills every process of the project before one can tell another."""
    processes = chain.processes()
    assert len(processes) > 4
    for process in processes:
        process.suspend()
    for process in processes:
        process.kill()
    chain.seconds_until_empty()


def _start(chain: Chain, receiver: Receiver, *arguments: str) -> Schedule:
    """Starts it with ``arguments``, or as docs/schedule.md does."""
    [[program, *documented]] = page.blocks("schedule")[0]
    assert program == "overnight"
    running = chain.start(
        *(arguments or documented),
        OVERNIGHT_WEBHOOK=receiver.url,
        PREFECT_RUNNER_POLL_FREQUENCY="1",
    )
    return Schedule(running, chain)


def _check_next_start(schedule: Schedule) -> None:
    """What is printed is what Prefect's scheduler has planned."""
    [(day, clock)] = re.findall(r"Next run: \w+ (\S+) (\S+) Europe/Berlin", schedule.said())
    deadline = time.monotonic() + _SECONDS_TO_START
    while not (planned := schedule.read("flow_runs/filter", _PLANNED)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first = min(datetime.fromisoformat(run["expected_start_time"]) for run in planned)
    assert f"{first.astimezone(ZoneInfo('Europe/Berlin')):%Y-%m-%d %H:%M}" == f"{day} {clock}"


_PLANNED = {"flow_runs": {"state": {"name": {"any_": ["Scheduled"]}}}}


def _check_message(receiver: Receiver, name: str) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while not receiver.received:
        assert time.monotonic() < deadline, "the automation sent nothing"
        time.sleep(0.1)
    text = json.loads(receiver.received[0][1])["text"]
    assert text.splitlines()[0] == "fresh: died without a word"
    assert text.splitlines()[-1].startswith(f"run {name}: its process died without a word")
    assert text.endswith(f"; {runs.UNBEGUN}")


def _kept_state(chain: Chain, flow_run: str) -> str:
    """The state of a flow run in the database of a server that has ended."""
    with sqlite3.connect(chain.root / ".overnight/prefect/prefect.db") as database:
        [(state,)] = database.execute("SELECT state_name FROM flow_run WHERE id = ?", (flow_run,)).fetchall()
    return str(state)
