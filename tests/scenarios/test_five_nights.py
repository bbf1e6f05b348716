"""Five nights of a team: PostgreSQL, a Prefect server with a password, `overnight schedule`, and a version rebuilt.

New data, nothing new, a night killed in training and continued, a worse model refused by the gate, a rollback; then
version 1 is rebuilt, though parameters, sources and the champion have moved on.
"""

import base64
import dataclasses
import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chain import STAGES, Chain, Ended, Running
from postgres import TeamServer, postgres, prefect_server
from receiver import Receiver, receiving

from flows import git, registry

_SECONDS_A_NIGHT = 240


@dataclasses.dataclass
class Team:
    """A project that `overnight schedule` serves on the team's Prefect server."""

    chain: Chain
    server: TeamServer
    receiver: Receiver
    schedule: Running

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Returns what Prefect's API answers."""
        key = base64.b64encode(self.server.auth.encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {key}"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.server.api}/{path}", data, headers), timeout=30
        ) as got:
            return json.load(got)

    def start_night(self) -> str:
        """Starts a night as the timetable does, or somebody in Prefect's UI; returns the flow run's id."""
        [deployment] = self.ask("deployments/filter", {})
        return str(self.ask(f"deployments/{deployment['id']}/create_flow_run", {})["id"])

    def wait(self, flow_run: str, *types: str) -> Any:
        """Returns the flow run when its state is one of ``types``."""
        deadline = time.monotonic() + _SECONDS_A_NIGHT
        while (found := self.ask(f"flow_runs/{flow_run}"))["state_type"] not in types:
            assert self.schedule.process.poll() is None, self.schedule.end()
            assert time.monotonic() < deadline, (found["state"], self.log())
            time.sleep(0.2)
        return found

    def night(self) -> Any:
        """Plays a whole night; returns the flow run at its end."""
        return self.wait(self.start_night(), "COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    def overnight(self, *arguments: str) -> Ended:
        return self.chain.overnight(*arguments, OVERNIGHT_WEBHOOK=self.receiver.url, **self.server.environment())

    def commit(self, message: str) -> None:
        git.git(self.chain.root, "add", "-A")
        git.git(self.chain.root, "-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "-q", "-m", message)

    def notices(self) -> list[tuple[str, str | None]]:
        """The kind and the version of each notice so far."""
        told = [json.loads(body).get("overnight") for _, body in self.receiver.received]
        return [(one["kind"], one["version"]) for one in told if one is not None]

    def versions(self) -> dict[str, tuple[str, ...]]:
        """The versions, and which stages each has."""
        return {version.name: version.stages for version in registry.versions(self.chain.root)}

    def heartbeats(self, flow_run: str) -> int:
        """How often the night has said that it lives."""
        resource = {"id": [f"prefect.flow-run.{flow_run}"]}
        wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": resource}
        return int(self.ask("events/filter", {"filter": wanted})["total"])

    def log(self) -> str:
        return (self.chain.root / ".overnight/logs/schedule.log").read_text()

    def last_run(self) -> list[str]:
        """The fields of the last line of `overnight runs`: run, started, state, stage, duration, version, why."""
        return self.overnight("runs").out.splitlines()[-1].split("\t")


@pytest.fixture
def team(fresh: Chain, tmp_path: Path) -> Iterator[Team]:
    fresh.set("ingest.split.test", 0.3)
    fresh.set("publish.git_remote", None)
    git.git(fresh.root, "-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "-qam", "More to measure on")
    with postgres() as database, prefect_server(tmp_path / "team", database) as server, receiving() as receiver:
        schedule = fresh.start(
            *("schedule", "--at", "03:00", "--timezone", "UTC"),
            OVERNIGHT_WEBHOOK=receiver.url,
            PREFECT_RUNNER_POLL_FREQUENCY="1",
            **server.environment(),
        )
        schedule.wait_until(lambda: "Next run" in schedule.said() or schedule.process.poll() is not None)
        assert schedule.process.poll() is None, schedule.end()
        yield Team(fresh, server, receiver, schedule)
        schedule.process.terminate()
        schedule.end()


@pytest.mark.timeout(900)
def test_five_nights(team: Team) -> None:
    chain = team.chain

    # The first night: all text is new.
    night = team.night()
    assert (night["state_name"], night["state"]["message"]) == ("Completed", "v1.0.0 is in production"), team.log()
    assert team.versions() == {"v1.0.0": ("prod",)}
    first = registry.resolve(chain.root, "v1.0.0").commit
    assert git.git(chain.root, "rev-parse", "nightly") == first

    # Nobody's checkout is touched, and what is not committed reaches no night.
    assert not (chain.root / "models/int8").exists()
    chain.set("train.learning_rate", 0.5)

    # The second: nothing new.
    night = team.night()
    assert (night["state_name"], night["state"]["message"]) == ("Nothing new", "nothing new since v1.0.0")
    assert team.versions() == {"v1.0.0": ("prod",)}
    assert team.last_run()[2] == "unchanged"
    chain.set("train.learning_rate", 0.003)

    # The third: a longer training, new text; the machine dies in it, and somebody goes on in the morning.
    chain.set("train.steps", 60)
    team.commit("Train longer")
    texts = sorted((chain.root / "texts").iterdir())
    texts[0].write_text(
        texts[0].read_text() + '{"text": "And the night was upon the face of the sea.", "group": "book 3"}\n'
    )
    killed = team.start_night()
    kill_at_checkpoint(team, 8)
    crashed = team.wait(killed, "CRASHED", "FAILED")
    assert crashed["state_type"] == "CRASHED"
    # By which a server finds out that a whole machine is gone.
    assert team.heartbeats(killed) > 0
    assert team.last_run()[2:4] == ["killed", "train"]
    ended = team.overnight("rerun")
    assert ended.code == 0, ended.err
    assert ended.first_steps("train")[0] > 8, ended.err
    night = team.ask(f"flow_runs/{killed}")
    assert (night["state_name"], night["run_count"]) == ("Completed", 2)
    assert night["state"]["message"] == "v1.1.0 is in production"
    assert team.versions() == {"v1.0.0": (), "v1.1.0": ("prod",)}

    # The fourth: hardly any training. The candidate is a version, the champion stays.
    chain.set("train.steps", 3)
    team.commit("Save time")
    night = team.night()
    assert night["state_name"] == "Refused"
    assert night["state"]["message"].startswith("v1.2.0 is not promoted: ")
    assert team.versions() == {"v1.0.0": (), "v1.1.0": ("prod",), "v1.2.0": ()}
    assert team.last_run()[2] == "refused"

    # The fifth: somebody does not like the new champion after all; the night after, nothing is new.
    ended = team.overnight("rollback")
    assert ended.code == 0, ended.err
    assert team.versions() == {"v1.0.0": ("prod",), "v1.1.0": (), "v1.2.0": ()}
    night = team.night()
    assert night["state_name"] == "Nothing new"
    assert team.versions() == {"v1.0.0": ("prod",), "v1.1.0": (), "v1.2.0": ()}

    wanted = [("success", "v1.0.0"), ("success", "v1.1.0"), ("refused", "v1.2.0")]
    assert [notice for notice in team.notices() if notice[0] != "unchanged"] == wanted
    assert list((chain.root / ".overnight/worktrees").iterdir()) == []

    # A year later, so to speak: version 1 again, from its raw text.
    for text in texts[1:]:
        text.unlink()
    ended = team.overnight("rebuild", "v1.0.0")
    assert ended.code == 0, ended.err
    certificate = json.loads((chain.root / ".overnight/certificates/v1.0.0.json").read_bytes())
    assert certificate["verdict"] == "identical"
    assert [stage["stage"] for stage in certificate["stages"]] == list(STAGES)


def kill_at_checkpoint(team: Team, step: int) -> None:
    """SIGKILLs the night, and all that it started, as soon as its training has a checkpoint after ``step`` steps."""
    pattern = ".overnight/worktrees/*/.overnight/checkpoints/train/*/step-*.pt"

    def saved() -> bool:
        return any(int(file.name.split("-")[1]) >= step for file in team.chain.root.glob(pattern))

    team.schedule.wait_until(saved)
    [worker] = {int(json.loads(file.read_bytes())["pid"]) for file in records(team) if is_running(file)}
    night = psutil.Process(worker)
    for process in [night, *night.children(recursive=True)]:
        os.kill(process.pid, signal.SIGKILL)


def records(team: Team) -> list[Path]:
    return list((team.chain.root / ".overnight/runs").glob("*.json"))


def is_running(file: Path) -> bool:
    return bool(json.loads(file.read_bytes())["state"] == "running")
