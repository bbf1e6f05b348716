"""Five nights of a team: PostgreSQL, a Prefect server with a password, `overnight schedule`, and a version rebuilt.

New data, nothing new, a night killed in training and continued, a worse model refused by the gate, a rollback; then
version 1 is rebuilt, though parameters, sources and the champion have moved on.
"""

import base64
import contextlib
import dataclasses
import json
import re
import time
import urllib.error
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

    def told(self) -> list[dict[str, Any]]:
        """The fields of each notice so far."""
        told = [json.loads(body).get("overnight") for _, body in self.receiver.received]
        return [one for one in told if one is not None]

    def notices(self) -> list[tuple[str, str | None]]:
        """The kind and the version of each notice so far."""
        return [(one["kind"], one["version"]) for one in self.told()]

    def events(self, count: int) -> list[str]:
        """The kinds of the nights' events, the oldest first, once the server has that many."""
        wanted = {"event": {"prefix": ["overnight.night."]}, "order": "ASC"}
        deadline = time.monotonic() + _SECONDS_A_NIGHT
        while len(events := self.ask("events/filter", {"filter": wanted})["events"]) < count:
            assert time.monotonic() < deadline, events
            time.sleep(0.2)
        return [event["event"].rpartition(".")[2] for event in events]

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
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{team.server.api}/admin/version", timeout=30)

    # The first night: all text is new.
    night = team.night()
    assert (night["state_name"], night["state"]["message"]) == ("Completed", "v1.0.0 is in production"), team.log()
    assert team.versions() == {"v1.0.0": ("prod",)}
    first = registry.resolve(chain.root, "v1.0.0").commit
    assert git.git(chain.root, "rev-parse", "nightly") == first
    run, _, state, _, _, version, why = team.last_run()
    assert (run, state, version) == (night["name"], "completed", "v1.0.0")
    assert why == "v1.0.0 is in production"

    # Nobody's checkout is touched, and what is not committed reaches no night.
    assert not (chain.root / "models/int8").exists()
    chain.set("train.learning_rate", 0.5)

    # The second: nothing new.
    night = team.night()
    assert (night["state_name"], night["state"]["message"]) == ("Nothing new", "nothing new since v1.0.0")
    assert team.versions() == {"v1.0.0": ("prod",)}
    assert team.last_run()[2] == "unchanged"
    # The server's own measure, in which a training cannot be.
    assert night["total_run_time"] < 30
    chain.set("train.learning_rate", 0.003)

    # The third: a longer training, new text; the machine dies in it, and somebody goes on in the morning.
    chain.set("train.steps", 60)
    team.commit("Train longer")
    texts = sorted((chain.root / "texts").iterdir())
    texts[0].write_text(
        texts[0].read_text() + '{"text": "And the night was upon the face of the sea.", "group": "book 3"}\n'
    )
    killed = team.start_night()
    saved = kill_at_checkpoint(team, 8)
    crashed = team.wait(killed, "CRASHED", "FAILED")
    assert crashed["state_type"] == "CRASHED"
    # By which a server finds out that a whole machine is gone.
    assert team.heartbeats(killed) > 0
    assert team.last_run()[2:4] == ["killed", "train"]
    ended = team.overnight("rerun")
    assert ended.code == 0, ended.err
    assert ended.first_steps("train") == [saved + 1], ended.err
    night = team.ask(f"flow_runs/{killed}")
    assert (night["state_name"], night["run_count"]) == ("Completed", 2)
    assert night["state"]["message"] == "v1.1.0 is in production"
    assert team.versions() == {"v1.0.0": (), "v1.1.0": ("prod",)}
    assert "And the night was upon the face of the sea." in raw_text(team, "v1.1.0")
    assert "And the night was upon the face of the sea." not in raw_text(team, "v1.0.0")

    # The fourth: hardly any training. The candidate is a version, the champion stays.
    chain.set("train.steps", 3)
    team.commit("Save time")
    night = team.night()
    assert night["state_name"] == "Refused"
    # Why stands in the run, the list of runs, the notice and the card.
    [reason] = failed_checks(team, "v1.2.0")
    assert night["state"]["message"] == f"v1.2.0 is not promoted: {reason}"
    assert team.last_run()[5:] == ["v1.2.0", night["state"]["message"]]
    assert team.told()[-1]["message"] == night["state"]["message"]
    assert reason in show(team, "v1.2.0", "models/card/README.md")
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
    # What an automation of the team's own can listen to.
    told = ["success", "unchanged", "success", "refused", "unchanged"]
    assert team.events(len(told)) == told
    _, *listed = [re.split(r"  +", line) for line in team.overnight("versions").out.splitlines()]
    measured = {name: bits_per_byte(team, name) for name in ("v1.2.0", "v1.1.0", "v1.0.0")}
    assert {line[0]: line[4] for line in listed} == {name: f"{value:.3f}" for name, value in measured.items()}
    assert list((chain.root / ".overnight/worktrees").iterdir()) == []

    # A year later, so to speak: version 1 again, from its raw text.
    for text in texts[1:]:
        text.unlink()
    ended = team.overnight("rebuild", "v1.0.0")
    assert ended.code == 0, ended.err
    certificate = json.loads((chain.root / ".overnight/certificates/v1.0.0.json").read_bytes())
    assert certificate["verdict"] == "identical"
    assert all(output["recorded"] == output["rebuilt"] for output in certificate["outputs"])
    assert len(certificate["outputs"]) == 8
    assert [stage["stage"] for stage in certificate["stages"]] == list(STAGES)


def bits_per_byte(team: Team, version: str) -> float:
    """The held-out bits per byte of a version's INT8 model."""
    models = json.loads(show(team, version, "models/evaluation.json"))["models"]
    return float(models["int8"]["bits_per_byte"]["value"])


def raw_text(team: Team, version: str) -> str:
    """All raw text of a version."""
    return "".join(path.read_text() for path in restored(team, version).glob("data/raw/**/*.jsonl"))


def show(team: Team, version: str, path: str) -> str:
    """A file of a version."""
    return (restored(team, version) / path).read_text()


def restored(team: Team, version: str) -> Path:
    """The folder in which `overnight restore` has laid out a version."""
    place = team.chain.root.parent / f"restored {version}"
    if not place.exists():
        ended = team.overnight("restore", version, "--to", str(place))
        assert ended.code == 0, ended.err
    return place


def failed_checks(team: Team, version: str) -> list[str]:
    """Why the gate refused a version, as its evaluation has it."""
    gate = json.loads(show(team, version, "models/evaluation.json"))["gate"]
    return [check["reason"] for check in gate["checks"] if not check["passed"]]


def kill_at_checkpoint(team: Team, step: int) -> int:
    """SIGKILLs the night, and all that it started, as soon as its training has a checkpoint after ``step`` steps.

    Returns the step of its last checkpoint.
    """
    pattern = ".overnight/worktrees/*/.overnight/checkpoints/train/*/step-*.pt"

    def saved() -> list[int]:
        return sorted(int(file.name.split("-")[1]) for file in team.chain.root.glob(pattern))

    team.schedule.wait_until(lambda: any(one >= step for one in saved()))
    [worker] = {int(json.loads(file.read_bytes())["pid"]) for file in records(team) if is_running(file)}
    night = psutil.Process(worker)
    for process in [night, *night.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            # The death of one may have ended another.
            process.kill()
    return saved()[-1]


def records(team: Team) -> list[Path]:
    return list((team.chain.root / ".overnight/runs").glob("*.json"))


def is_running(file: Path) -> bool:
    return bool(json.loads(file.read_bytes())["state"] == "running")
