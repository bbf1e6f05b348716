"""What a Prefect server tells by itself: the automations of ``deployments/automations.yaml`` on a real one."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from chain import Chain
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_server import PrefectServer
from receiver import Receiver, receiving

from flows import automations
from tasks.notice_params import NoticeParams

_SECONDS = 60
_LEAST_SECONDS = 10
_NIGHT = """
import time
from prefect import flow
from prefect.runtime import flow_run
@flow
def nightly():
    print(flow_run.get_name(), flush=True)
    time.sleep(600)
nightly()
"""
_NOTICE = """
from flows import notice, run
from tasks.notice_params import NoticeParams
told = notice.Notice("refused", "project", "20261124-020000-abc", "v1.1.0 is not promoted: worse by 3%")
# By webhook it would be told twice.
print(notice.tell(told, NoticeParams(kinds=[])))
run.flush()
"""


@pytest.fixture(scope="module")
def server_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server has its files."""
    return tmp_path_factory.mktemp("automations") / "server"


@pytest.fixture(scope="module")
def prefect(server_home: Path, prefect_database: Path) -> Iterator[PrefectServer]:
    """A server for this module alone: its automations would act on other tests' nights."""
    with PrefectServer(server_home, prefect_database) as started:
        yield started


def test_a_server_tells_how_a_night_ended_and_which_one_died(
    blank: Chain, server_home: Path, prefect: PrefectServer
) -> None:
    with receiving() as receiver:
        chain = blank.at(prefect.api)
        installed = _python(chain, receiver, "-m", "flows.automations")
        assert len(installed.splitlines()) == 3
        # The address is a secret: nobody reads it on the server.
        assert "SECRET" not in json.dumps(prefect.ask("block_documents/filter", {}))

        known = {one["name"]: one for one in prefect.ask("automations/filter", {})}
        ended = known["overnight: how a night ended"]
        assert not ended["enabled"]
        _send("PATCH", f"{prefect.api}/automations/{ended['id']}", {"enabled": True})
        # Installed again, it stays switched on.
        _python(chain, receiver, "-m", "flows.automations")

        # A server takes a moment to act by a changed automation.
        deadline = time.monotonic() + _SECONDS
        while not receiver.received:
            assert time.monotonic() < deadline, (server_home / "server.log").read_text()
            assert "not sent: params.yaml's notice.kinds leaves out 'refused'" in _python(
                chain, receiver, "-c", _NOTICE
            )
            time.sleep(2)
        told = json.loads(receiver.received[0][1])["text"]
        assert told.startswith("overnight: run 20261124-020000-abc\n")
        assert "v1.1.0 is not promoted: worse by 3%" in told

        flow = prefect.ask("flows/", {"name": "nightly"})["id"]
        deployment = prefect.ask("deployments/", {"name": "weekly-scratch", "flow_id": flow})["id"]
        # A rerun finds what has begun; a worker without the project's folder has begun nothing.
        advice = {
            "20261125-020000-def": "Go on with: overnight rerun 20261125-020000-def",
            "unruly-heron": "Nothing of it was begun, and the next night does its work. Why it did not begin is in the "
            "log of its worker.",
        }
        for name, told in advice.items():
            asked = {"flow_id": flow, "deployment_id": deployment, "name": name}
            night = prefect.ask("flow_runs/", asked)["id"]
            if "overnight rerun" in told:
                _set_state(prefect, night, "RUNNING", "")
            _set_state(prefect, night, "CRASHED", "Process exited with status code: 1.")
            wanted = f"overnight: run {name} of weekly-scratch died\nProcess exited with status code: 1.\n{told}"
            while wanted not in [json.loads(body)["text"] for _, body in receiver.received]:
                assert time.monotonic() < deadline + _SECONDS, receiver.received
                time.sleep(0.2)


def _set_state(prefect: PrefectServer, flow_run: str, kind: str, message: str) -> None:
    state = {"type": kind, "name": kind.capitalize(), "message": message}
    prefect.ask(f"flow_runs/{flow_run}/set_state", {"state": state, "force": True})


def test_a_night_that_is_not_heard_of_any_more_is_marked_and_told(
    blank: Chain, server_home: Path, prefect: PrefectServer
) -> None:
    with receiving() as receiver:
        chain = blank.at(prefect.api)
        _python(chain, receiver, "-m", "flows.automations")
        known = {one["name"]: one for one in prefect.ask("automations/filter", {})}
        silent = known["overnight: a night is not heard of any more"]
        # As installed, but for the time that it waits: the least that Prefect takes.
        assert silent["trigger"]["within"] == 300
        silent["trigger"]["within"] = _LEAST_SECONDS
        kept = ("name", "description", "enabled", "trigger", "actions", "actions_on_trigger", "actions_on_resolve")
        _send("PUT", f"{prefect.api}/automations/{silent['id']}", {name: silent[name] for name in kept})

        night = subprocess.Popen(
            [sys.executable, "-c", _NIGHT],
            env=chain.environment(PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert night.stdout is not None
        name = night.stdout.readline().strip()
        deadline = time.monotonic() + _SECONDS
        while not _heartbeats(prefect):
            assert time.monotonic() < deadline, (server_home / "server.log").read_text()
            time.sleep(0.2)
        night.kill()
        night.wait()

        why = "No heartbeat for five minutes; its process or its machine is gone."
        wanted = f"overnight: run {name} died\n{why}\nGo on with: overnight rerun {name}"
        while wanted not in [json.loads(body)["text"] for _, body in receiver.received]:
            assert time.monotonic() < deadline + _SECONDS, receiver.received
            time.sleep(0.2)
        (run,) = [one for one in prefect.ask("flow_runs/filter", {}) if one["name"] == name]
        assert run["state_type"] == "CRASHED"


def test_a_block_of_somebody_s_choice_outlasts_the_next_installation_without_a_webhook_too(
    prefect: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, variable = "overnight: how a night ended", "OVERNIGHT_WEBHOOK"
    with (
        temporary_settings({PREFECT_API_URL: prefect.api}),
        get_client(sync_client=True) as client,
    ):
        monkeypatch.setenv(variable, "http://127.0.0.1:9/chat")
        automations.install(client, tiny.ROOT, NoticeParams())
        mail = CustomWebhookNotificationBlock(name="mail", url="http://127.0.0.1:9/mail").save("mail")
        (ended,) = client.read_automations_by_name(name)
        kept = {"name", "description", "trigger", "actions"}
        chosen = ended.model_dump(mode="json", include=kept) | {"enabled": True}
        chosen["actions"][0]["block_document_id"] = str(mail)
        client.update_automation(ended.id, AutomationCore.model_validate(chosen))
        for webhook, installed in (("http://127.0.0.1:9/chat", 3), ("", 2)):
            monkeypatch.setenv(variable, webhook)
            assert len(automations.install(client, tiny.ROOT, NoticeParams())) == installed
            (ended,) = client.read_automations_by_name(name)
            assert ended.enabled
            assert ended.model_dump()["actions"][0]["block_document_id"] == mail


def _heartbeats(prefect: PrefectServer) -> int:
    wanted = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}}}
    return int(prefect.ask("events/filter", wanted)["total"])


def _python(chain: Chain, receiver: Receiver, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=chain.root,
        env=chain.environment(PYTHONPATH=str(tiny.ROOT), OVERNIGHT_WEBHOOK=receiver.url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _send(method: str, url: str, body: dict[str, object]) -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
    )
    urllib.request.urlopen(request, timeout=30).close()
