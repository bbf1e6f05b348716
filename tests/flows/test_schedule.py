"""What `overnight schedule` does before anything starts, and with a child that ends by itself."""

import io
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prefect_server import PrefectServer
from processes import ENDS_SLOWLY, leave_lock
from rich.console import Console
from waiting import until

from flows import lock, runs, schedule
from flows.git import author, git
from flows.process import Child
from flows.timetable import Timetable
from tasks.errors import TryAgain, UserMistake

if TYPE_CHECKING:
    from conftest import Project


def _kept(log: Path, code: str = "raise SystemExit(3)", out: Console | None = None) -> schedule._Kept:
    command = [sys.executable, "-c", code]
    return schedule._Kept("the runner", log, lambda: Child(command, log, {}), out or Console(file=io.StringIO()))


def _until_ended(kept: schedule._Kept) -> None:
    while kept._child.wait(0.01) is None:
        pass


def test_a_child_that_ends_after_a_while_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_SECONDS_TO_PROVE", 0.0)
    out = io.StringIO()
    with _kept(tmp_path / "log", out=Console(file=out, width=200)) as kept:
        first = kept._child
        _until_ended(kept)
        kept.look()
        assert kept._child is not first
    assert "the runner ended (exit code 3); it is started again" in out.getvalue()


def test_a_child_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    with _kept(tmp_path / "log") as kept:
        _until_ended(kept)
        with pytest.raises(TryAgain, match=r"ended soon .* \(exit code 3\); its log is .*/log"):
            kept.look()


def test_a_mistake_that_a_child_ends_with_is_told_as_one(tmp_path: Path) -> None:
    says = "import sys; print('warning'); print('error: no such file.'); sys.exit(2)"
    with _kept(tmp_path / "log", says) as kept:
        _until_ended(kept)
        with pytest.raises(UserMistake, match=r"^no such file\.$"):
            kept.look()


def test_without_its_automations_a_schedule_ends_with_one_line(project: "Project", prefect_database: Path) -> None:
    home = project.root / ".overnight/prefect"
    home.mkdir(parents=True)
    shutil.copy(prefect_database, home)
    git(project.root, "add", "--all", "--", "params.yaml", "dvc.yaml")
    git(project.root, "commit", "-q", "-m", "-", environment=author(project.root))
    done = project.overnight("schedule")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {project.root}/deployments/automations.yaml: no such file.")
    assert done.stderr.count("\n") == 1


def test_a_schedule_that_serves_already_is_a_mistake_and_nothing_to_wait_for(tmp_path: Path) -> None:
    told = r"another `overnight schedule` \(process \d+, since .*Stop that one first\.$"
    out = Console(file=io.StringIO())
    with schedule._sole(tmp_path, out), pytest.raises(UserMistake, match=told), schedule._sole(tmp_path, out):
        pytest.fail("two serve one project")


def test_what_an_ended_schedule_has_left_at_work_is_waited_for_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_SECONDS_UNTOLD", 0.0)
    leave_lock(tmp_path, 1.0, schedule.LOCK)
    out = io.StringIO()
    with schedule._sole(tmp_path, Console(file=out)):
        assert "its training still writes a checkpoint; waiting for that" in out.getvalue()


def test_a_child_at_work_is_left_alone(tmp_path: Path) -> None:
    with _kept(tmp_path / "log", "import time; time.sleep(60)") as kept:
        first = kept._child
        kept.look()
        assert kept._child is first
        started = time.monotonic()
    assert time.monotonic() - started < 3


def test_a_night_at_work_has_time_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, out = [sys.executable, "-c", ENDS_SLOWLY], io.StringIO()
    with lock.hold(tmp_path, "any") as held:
        log, start = tmp_path / "log", lambda: schedule._run(command, tmp_path / "log", os.environ, held)
        with schedule._Kept("the runner", log, start, Console(file=out, width=20)):
            until((tmp_path / "up").exists)
    assert (tmp_path / "left").exists()
    told = " The night at work was told to end; it may take up to 35 s: a training writes a checkpoint first.\n"
    (line,) = out.getvalue().splitlines(keepends=True)
    assert line.endswith(told)


@pytest.mark.parametrize(("second", "is_late"), [(40, False), (50, True)])
def test_a_start_that_may_be_too_soon_to_be_planned_has_the_one_after_it_beside_it(
    second: int, is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls(2026, 11, 29, 23, 50, second, tzinfo=UTC)

    monkeypatch.setattr(schedule, "datetime", Clock)
    out = io.StringIO()
    started = schedule.Started(crashed=(), paused=False)
    schedule._tell(Console(file=out, width=80), Path(), started, Timetable("51 * * * *", "UTC"), "there")
    told = "Next run: Sunday 2026-11-29 23:51 UTC, in 0 h 1 min."
    later = " If that is too soon for the server to plan it, Monday 2026-11-30 00:51."
    assert out.getvalue().splitlines()[0] == told + later * is_late


def test_a_night_that_died_is_gone_on_with_only_where_it_had_begun(tmp_path: Path) -> None:
    runs.begin(tmp_path, "begun", night=True)
    out = io.StringIO()
    started = schedule.Started(crashed=["begun", "unbegun"], paused=False)
    schedule._tell(Console(file=out, width=80), tmp_path, started, Timetable("51 * * * *", "UTC"), "there")
    died = "had died without a word. It is marked as crashed;"
    assert out.getvalue().splitlines()[:2] == [
        f"Run begun {died} `overnight rerun` goes on with it.",
        f"Run unbegun {died} nothing of it was begun, and the next night does its work.",
    ]


def test_a_deployment_on_a_shared_server_names_machine_and_project() -> None:
    one, other = (schedule.deployment_name(Path(place), shared=True) for place in ("/srv/one", "/srv/other"))
    assert one != other
    assert schedule.deployment_name(Path("/srv/one"), shared=False) == "nightly"


@pytest.mark.parametrize("api", ["http://prefect.example:4200/api", "http://prefect.example:4200/api/"])
def test_what_is_named_to_people_is_the_servers_pages_and_not_what_programs_ask(api: str) -> None:
    assert schedule.pages(api) == "http://prefect.example:4200"


def test_a_pause_from_prefects_ui_outlasts_a_restart(prefect: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect.api)
    # One a process: others import Prefect without these settings.
    code = """
from pathlib import Path
from prefect.client.orchestration import get_client
from flows import runner
from flows.nightly import nightly
from flows.timetable import Timetable

with get_client(sync_client=True) as client:
    said = [runner._is_paused(client, "nightly/paused")]
    for pauses in (False, True, None):
        paused = runner._is_paused(client, "nightly/paused")
        runner.make_deployment(nightly, "paused", Timetable("0 2 * * *", "UTC"), Path("/srv"), paused).apply()
        deployment = client.read_deployment_by_name("nightly/paused")
        if pauses:
            client.pause_deployment(deployment.id)
        said.append(client.read_deployment_by_name("nightly/paused").paused)
print(said)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[False, False, True, True]"], done.stderr


@pytest.mark.parametrize("websockets", ["lost meanwhile", "never there"])
def test_a_runner_and_its_nights_outlive_a_server_that_is_away_for_long(
    prefect: PrefectServer, monkeypatch: pytest.MonkeyPatch, websockets: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect.api)
    code = """
import asyncio
import sys
from types import SimpleNamespace

import httpx
from flows import runner
from prefect._internal import observers

answer = httpx.Response(502, request=httpx.Request("POST", "http://127.0.0.1"))
absent = [httpx.ConnectError("refused"), httpx.HTTPStatusError("bad gateway", request=answer.request, response=answer)]
asked = dict.fromkeys(("runs", "cancelled"), 0)

def away(what, then):
    async def ask(**_):
        asked[what] += 1
        if asked[what] > 6:
            then()
        raise absent[asked[what] % 2]
    return ask

def refuse(**_):
    raise ConnectionError("no websockets")

if sys.argv[1] == "never there":
    observers.get_events_subscriber = refuse

async def main():
    async with runner._Runner(name="any", query_seconds=0.01) as one:
        loops = []
        one._scheduled_run_poller._client = SimpleNamespace(
            get_scheduled_flow_runs_for_deployments=away("runs", lambda: loops[0].cancel())
        )
        observer = one._cancelling_observer
        observer.polling_interval = 0.01
        observer._client = SimpleNamespace(read_flow_runs=away("cancelled", lambda: observer._polling_task.cancel()))
        if observer._polling_task is None:
            lost = asyncio.Future()
            lost.set_exception(RuntimeError("no websocket"))
            observer._start_polling_task(lost)
        loops.append(asyncio.create_task(one._scheduled_run_poller.run()))
        await asyncio.wait([*loops, observer._polling_task])
        print(asked)

asyncio.run(main())
"""
    command = [sys.executable, "-c", code, websockets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["{'runs': 7, 'cancelled': 7}"], done.stdout + done.stderr


def test_nights_on_a_shared_server_send_heartbeats_by_which_a_dead_machine_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", raising=False)
    assert schedule._environment(shared=True)["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert "PREFECT_FLOWS_HEARTBEAT_FREQUENCY" not in schedule._environment(shared=False)
    monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "60")
    assert schedule._environment(shared=True)["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "60"


def test_outside_a_project_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserMistake, match=r"no dvc\.yaml here"):
        schedule.schedule(schedule.Request(), Console(file=io.StringIO()))
    assert not any(tmp_path.iterdir())


def test_a_port_that_is_taken_is_left_to_whom_it_belongs() -> None:
    with schedule._listen(0) as first, schedule._listen(first.getsockname()[1]) as second:
        assert second.getsockname()[0] == "127.0.0.1"
        assert second.getsockname()[1] != first.getsockname()[1]
