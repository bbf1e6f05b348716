"""What a Prefect server tells by itself: the automations of ``deployments/automations.yaml`` on a real one."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import tiny
from chain import Chain
from prefect_server import PrefectServer
from receiver import Receiver, receiving

_SECONDS = 60
_NOTICE = """
from flows import notice, run
from tasks.notice_params import NoticeParams
told = notice.Notice("refused", "project", "20261124-020000-abc", "v1.1.0 is not promoted: worse by 3%")
# By webhook it would be told twice.
print(notice.tell(told, NoticeParams(kinds=[])))
run.flush()
"""


def test_a_server_tells_how_a_night_ended_and_which_one_died(blank: Chain, tmp_path: Path) -> None:
    home = tmp_path / "server"
    home.mkdir()
    with PrefectServer(home) as prefect, receiving() as receiver:
        chain = blank.at(prefect.api)
        installed = _python(chain, receiver, "-m", "flows.automations")
        assert len(installed.splitlines()) == 3
        # The address is a secret: nobody reads it on the server.
        assert "SECRET" not in json.dumps(prefect.ask("block_documents/filter", {}))

        automations = {one["name"]: one for one in prefect.ask("automations/filter", {})}
        ended = automations["overnight: how a night ended"]
        assert not ended["enabled"]
        _patch(f"{prefect.api}/automations/{ended['id']}", {"enabled": True})
        # Installed again, it stays switched on.
        _python(chain, receiver, "-m", "flows.automations")

        # A server takes a moment to act by a changed automation.
        deadline = time.monotonic() + _SECONDS
        while not receiver.received:
            assert time.monotonic() < deadline, (home / "server.log").read_text()
            assert "not sent: params.yaml's notice.kinds leaves out 'refused'" in _python(
                chain, receiver, "-c", _NOTICE
            )
            time.sleep(2)
        told = json.loads(receiver.received[0][1])["text"]
        assert told.startswith("overnight: run 20261124-020000-abc\n")
        assert "v1.1.0 is not promoted: worse by 3%" in told

        flow = prefect.ask("flows/", {"name": "nightly"})["id"]
        night = prefect.ask("flow_runs/", {"flow_id": flow, "name": "20261125-020000-def"})["id"]
        died = {
            "state": {"type": "CRASHED", "name": "Crashed", "message": "No heartbeat for five minutes"},
            "force": True,
        }
        prefect.ask(f"flow_runs/{night}/set_state", died)
        wanted = "overnight: run 20261125-020000-def died\nNo heartbeat for five minutes\nGo on with: overnight rerun"
        while wanted not in [json.loads(body)["text"] for _, body in receiver.received]:
            assert time.monotonic() < deadline + _SECONDS, receiver.received
            time.sleep(0.2)


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


def _patch(url: str, body: dict[str, object]) -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="PATCH"
    )
    urllib.request.urlopen(request, timeout=30).close()
