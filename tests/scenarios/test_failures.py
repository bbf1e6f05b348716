"""What the world does to a run, but for kills: after each, one `overnight rerun`, or the UI's Retry, ends it well."""

import contextlib
import fcntl
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import needed
import psutil
import publishing
import pytest
from chain import Chain, Running, signal_at
from prefect_server import PrefectServer
from publishing import Clone
from receiver import Receiver, receiving
from rich.console import Console
from ruamel.yaml import YAML

from flows import contents, history, lock, publish, runs
from flows.git import git
from tasks import paths

if TYPE_CHECKING:
    from conftest import Reference

# Set another seed to try other moments.
SEED = int(os.environ.get("SCENARIO_SEED", "0"))
_SECONDS_A_NIGHT = 120
# As the button has it: not forced.
_RETRY = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}, "force": False}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True).returncode:
        needed.missing("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Takes all the room there is; returns the file that has it."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    return ballast


def test_a_disk_that_fills_up_is_told_and_with_room_the_run_is_finished(
    finished: Chain, server: str, reference: "Reference", small_disk: Path
) -> None:
    chain = finished.at(server).copy(small_disk / "project")
    started = chain.start("run", "--from", "card", "--force")
    assert started.stage_process("card") is not None
    ballast = fill(small_disk)
    ended = started.end()
    assert ended.code == 2, ended.err
    assert "the disk is full" in ended.complaint()
    assert ended.complaint().endswith("Free some space and run again.")
    # No room even for the lock of the next run: one line as well.
    assert "the disk is full" in chain.overnight("rerun").complaint()
    ballast.unlink()
    ended = chain.overnight("rerun")
    assert ended.code == 0, ended.err
    assert ended.outcomes()["card"] == "ran"
    assert chain.version() == reference.version


def test_a_dvc_command_that_holds_the_lock_is_waited_for_and_changed_parameters_are_told(
    finished: Chain, server: str
) -> None:
    undisturbed = finished.at(server).copy(finished.root.with_name("undisturbed"))
    undisturbed.set("card.contact", "somebody else")
    assert undisturbed.overnight("run").code == 0

    chain = finished.at(server)
    chain.set("card.contact", "somebody")
    started = chain.start("run")
    assert started.kill_stage("card", 0.1)
    assert started.end().code == 1

    chain.set("card.contact", "somebody else")
    with repository_locked(chain) as holder:
        assert f"process {holder}: " in chain.overnight("rerun").complaint()
        rerun = chain.start("rerun", "--wait")
        rerun.wait_until(lambda: "Waiting for it to end" in rerun.said("err"))
    # And in the middle of a stage, which needs it at its end.
    working = rerun.stage_process("card")
    assert working is not None
    with repository_locked(chain):
        working.wait(_SECONDS_A_NIGHT)
        time.sleep(1)
        assert rerun.process.poll() is None
    ended = rerun.end()
    assert ended.code == 0, ended.err
    assert "params.yaml was changed since this run stopped" in ended.err
    assert "somebody else" in (chain.root / "models/card/README.md").read_text()
    assert chain.version() == undisturbed.version()


@contextlib.contextmanager
def repository_locked(chain: Chain) -> Iterator[int]:
    """Holds DVC's lock as a hand-typed `dvc gc` does, in this process; yields its number."""
    with (chain.root / ".dvc/tmp/lock").open("w") as file:
        file.write(f" {os.getpid()}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield os.getpid()


class Nights:
    """A small project that `overnight schedule` serves."""

    def __init__(
        self, clone: Clone, chain: Chain, prefect: PrefectServer, schedule: Running, receiver: Receiver
    ) -> None:
        self.clone, self.chain, self._prefect, self._schedule = clone, chain, prefect, schedule
        self._receiver = receiver

    def start(self, planned: datetime | None = None) -> str:
        """Starts a night as the timetable does, for now or the time ``planned``; returns the flow run's id."""
        found = self._prefect.ask("deployments/filter", {})
        (deployment,) = [one["id"] for one in found if one["parameters"] == {"project": str(self.clone.root)}]
        body = {}
        if planned is not None:
            details = {"scheduled_time": planned.isoformat()}
            body = {"state": {"type": "SCHEDULED", "name": "Scheduled", "state_details": details}}
        return str(self._prefect.ask(f"deployments/{deployment}/create_flow_run", body)["id"])

    def retry(self, flow_run: str) -> None:
        """Presses Retry in Prefect's UI."""
        self._prefect.ask(f"flow_runs/{flow_run}/set_state", _RETRY)

    def read(self, flow_run: str) -> Any:
        return self._prefect.ask(f"flow_runs/{flow_run}")

    def wait(self, flow_run: str, state: str) -> Any:
        """Returns the flow run as soon as it is in the state."""
        self._until(lambda: self.read(flow_run)["state_type"] == state)
        return self.read(flow_run)

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _SECONDS_A_NIGHT
        while not condition():
            assert time.monotonic() < deadline, (self.chain.root / ".overnight/logs/schedule.log").read_text()
            time.sleep(0.2)

    def stop_at(self, flow_run: str, stage: str, number: signal.Signals, seconds: float) -> bool:
        """Sends a signal to the night's process, so long after it began with ``stage``; False when it had ended."""
        found: list[psutil.Process] = []

        def works() -> bool:
            run = runs.of_flow_run(self.clone.root, flow_run)
            if run is not None and run.stages and run.stages[-1].stage == stage:
                found.append(psutil.Process(run.pid))
            return bool(found)

        self._until(works)
        return signal_at(found[0], number, time.time() - found[0].create_time() + seconds)

    def told(self) -> list[dict[str, Any]]:
        """What the webhook was told."""
        return [json.loads(body)["overnight"] for _, body in self._receiver.received]

    def notices(self) -> list[tuple[str, str]]:
        """Kind and message of what the webhook was told."""
        return [(one["kind"], one["message"]) for one in self.told()]

    def params_of(self, tag: str) -> str:
        """The parameters of a version."""
        return git(self.clone.root, "show", f"{tag}:params.yaml")

    def commit_params(self, **changed: Any) -> None:
        """Commits a change of ``params.yaml``; ``flow__retries`` is ``flow.retries``."""
        yaml = YAML()
        content = yaml.load(git(self.clone.root, "show", "HEAD:params.yaml"))
        for name, value in changed.items():
            section, key = name.split("__")
            content[section][key] = value
        yaml.dump(content, self.clone.root / "params.yaml")
        git(self.clone.root, "commit", "-q", "-m", "Parameters", "--", "params.yaml", environment=author())

    def overnight(self, *arguments: str) -> Any:
        return self.chain.overnight(*arguments, PYTHONPATH=str(publishing.REPOSITORY))

    def runs(self) -> list[list[str]]:
        """The fields of each line of `overnight runs`, without its process."""
        out = io.StringIO()
        history.show(Console(file=out), runs.read(self.clone.root))
        return [line.split("\t") for line in out.getvalue().splitlines()]


@pytest.fixture
def nights(tmp_path: Path, home: Path, prefect: PrefectServer) -> Iterator[Nights]:
    clone = publishing.collecting(tmp_path / "place")
    write_text(clone, 0)
    chain = Chain(clone.root, home, prefect.api)
    with receiving() as receiver:
        schedule = chain.start(
            *("schedule", "--at", "03:00"),
            PREFECT_RUNNER_POLL_FREQUENCY="1",
            PYTHONPATH=str(publishing.REPOSITORY),
            OVERNIGHT_WEBHOOK=receiver.url,
        )
        schedule.wait_until(lambda: "Next run" in schedule.said() or schedule.process.poll() is not None)
        assert schedule.process.poll() is None, schedule.end()
        yield Nights(clone, chain, prefect, schedule, receiver)
        schedule.process.terminate()
        schedule.end()


def write_text(clone: Clone, number: int) -> None:
    """Writes the text of that number where the project collects them."""
    (clone.root / f"texts/{number}.txt").write_text(f"And the evening and the morning were day {number}.\n")


class Undisturbed:
    """A small project whose versions are made undisturbed, without Prefect, one of each text and those before it."""

    def __init__(self, place: Path) -> None:
        self._clone = publishing.collecting(place)
        self._made: list[dict[str, str]] = []

    def versions(self, count: int) -> list[dict[str, str]]:
        """Returns what each of the first ``count`` consists of."""
        for number in range(len(self._made), count):
            write_text(self._clone, number)
            with contextlib.chdir(self._clone.root):
                self._clone.collect()
                self._clone.run()
                publish.publish(self._clone.root)
            self._made.append(outputs(self._clone, f"lm@v1.{number}.0"))
        return self._made[:count]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed") / "place")


def outputs(clone: Clone, tag: str) -> dict[str, str]:
    """The MD5 of all that the version consists of, but for the champion's record, which names a commit."""
    recorded = contents.recorded(clone.root, tag)
    found = {str(output.path): output.md5 for output in recorded if output.path != paths.CHAMPION}
    assert {"data/raw", "models/int8", "models/evaluation.json"} == found.keys()
    return found


def author() -> dict[str, str]:
    return {f"GIT_{role}_{what}": "a@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.mark.timeout(600)
def test_a_night_whose_remote_is_gone_fails_at_publishing_and_one_more_attempt_makes_one_version(
    nights: Nights, undisturbed: Undisturbed
) -> None:
    clone = nights.clone
    night = nights.start()
    # A file where the remote's folder should be.
    clone.shelf.write_text("")
    failed = nights.wait(night, "FAILED")
    assert failed["state"]["message"].startswith("publish: DVC: ")
    assert clone.tags() == []
    (run,) = nights.runs()
    assert (run[2], run[3]) == ("failed", "publish")
    (notice,) = nights.told()
    assert (notice["kind"], notice["stage"], notice["command"]) == ("failure", "publish", f"overnight rerun {run[0]}")
    assert notice["last_lines"], notice
    assert clone.shelf.name in " ".join(notice["last_lines"]), notice

    clone.shelf.unlink()
    nights.retry(night)
    retried = nights.wait(night, "COMPLETED")
    done = runs.of_flow_run(clone.root, night)
    assert done is not None
    again = {one.stage: one.outcome for one in done.stages}
    assert again["publish"] == "ran"
    assert {outcome for stage, outcome in again.items() if stage != "publish"} == {"cached"}
    assert retried["state"]["message"] == "v1.0.0 is in production"
    assert retried["run_count"] == 2
    assert clone.tags() == ["lm#prod#1", "lm@v1.0.0"]
    clone.check_remote()
    expected = undisturbed.versions(2)
    assert outputs(clone, "lm@v1.0.0") == expected[0]

    write_text(clone, 1)
    kept = nights.params_of("lm@v1.0.0")
    clone.shelf.rename(clone.shelf.with_name("away"))
    clone.shelf.write_text("")
    second = nights.start()
    nights.wait(second, "FAILED")
    failed_again = nights.overnight("rerun")
    assert failed_again.code == 1, failed_again
    # The first version lies where nothing is to be seen now.
    assert failed_again.complaint().startswith("publish: DVC's remote 'shelf' has nothing of v1.0.0, which was pushed")
    assert "Go on with: overnight rerun " in failed_again.err.splitlines()[-1]
    clone.shelf.unlink()
    clone.shelf.with_name("away").rename(clone.shelf)
    # As a machine leaves it that goes down while Git works in the night's worktree.
    (worktree,) = (clone.root / ".git/worktrees").iterdir()
    (worktree / "index.lock").touch()
    # What is committed meanwhile is for the next night.
    nights.commit_params(flow__skip_when_late_minutes=119)
    ended = nights.overnight("rerun")
    assert "later commits are for the next night" in ended.err
    assert nights.params_of("lm@v1.1.0") == kept
    assert ended.code == 0, ended.err
    assert "quantize  cached" in ended.err, ended.err
    ended_night = nights.read(second)
    assert (ended_night["state_name"], ended_night["run_count"]) == ("Completed", 3)
    assert ended_night["state"]["message"] == "v1.1.0 is in production"
    assert clone.tags() == ["lm#prod#1", "lm#prod#2", "lm@v1.0.0", "lm@v1.1.0"]
    clone.check_remote()
    assert outputs(clone, "lm@v1.1.0") == expected[1]
    assert [one[2] for one in nights.runs()] == ["completed", "completed"]
    assert not list((clone.root / ".overnight/worktrees").iterdir())

    # As when the server missed how it ended: one more attempt finds the version that the night has made.
    nights.retry(second)
    nights._until(lambda: nights.read(second)["run_count"] == 4)
    once_more = nights.wait(second, "COMPLETED")
    assert once_more["state"]["message"] == "nothing new since v1.1.0"
    # Repeated on purpose, it works on what the night has made and not on what there was before.
    repeated = nights.overnight("rerun", nights.runs()[-1][0], "--from", "evaluate")
    assert repeated.code == 0, repeated.err
    assert "evaluate  cached" in repeated.err
    assert clone.tags() == ["lm#prod#1", "lm#prod#2", "lm@v1.0.0", "lm@v1.1.0"]

    # A worktree that cannot be filled is a failure with its name and what DVC said, not a bug with a traceback.
    write_text(clone, 2)
    shutil.rmtree(clone.root / ".dvc/cache")
    clone.shelf.rename(clone.shelf.with_name("away"))
    clone.shelf.write_text("")
    unfilled = nights.wait(nights.start(), "FAILED")
    assert unfilled["state"]["message"].startswith("checkout: "), unfilled["state"]
    assert "StageFailed" not in unfilled["state"]["message"]
    assert nights.runs()[-1][2:4] == ["failed", "checkout"]


@pytest.mark.timeout(600)
def test_a_night_stopped_while_it_publishes_ends_as_the_version_that_it_would_have_been(
    nights: Nights, undisturbed: Undisturbed
) -> None:
    clone = nights.clone
    draw = random.Random(SEED)
    made = 0
    wanted = [signal.SIGKILL, signal.SIGTERM]
    while wanted:
        moment = draw.uniform(0, 1)
        print(f"{wanted[0].name} {moment:.3f} s after it began to publish (seed {SEED})")
        if nights.stop_at(nights.start(), "publish", wanted[0], moment):
            # Else it had ended by then, and the next night is stopped.
            wanted.pop(0)
        ended = nights.overnight("rerun", "--wait")
        assert ended.code == 0 or "nothing to go on with" in ended.err, ended.err
        assert nights.runs()[-1][2] == "completed"
        made += 1
        assert [tag for tag in clone.tags() if "@" in tag] == [f"lm@v1.{index}.0" for index in range(made)]
        clone.check_remote()
        write_text(clone, made)
    assert [outputs(clone, f"lm@v1.{index}.0") for index in range(made)] == undisturbed.versions(made)


@pytest.mark.timeout(600)
def test_a_night_goes_by_what_is_committed_waits_its_turn_and_tells_how_it_ended(nights: Nights) -> None:
    clone = nights.clone
    # Half typed, and not committed.
    (clone.root / "params.yaml").write_text("publish: {branch: elsewhere")
    first = nights.wait(nights.start(), "COMPLETED")
    assert first["state"]["message"] == "v1.0.0 is in production", first["state"]
    assert nights.notices() == [("success", "v1.0.0 is in production")]

    nights.commit_params(flow__skip_when_late_minutes=-1)
    wrong = nights.wait(nights.start(), "FAILED")
    assert "flow.skip_when_late_minutes: " in wrong["state"]["message"]
    assert nights.notices()[1:] == [("failure", wrong["state"]["message"])]
    assert nights.runs()[-1][2] == "failed"

    nights.commit_params(flow__skip_when_late_minutes=0.001)
    with lock.hold(clone.root, "another"):
        late = nights.start()
        # With no minute to lose it is late before it can begin, or else after it has waited.
        skipped = nights.wait(late, "COMPLETED")
    assert skipped["state_name"] == "Skipped"
    assert nights.notices()[2][0] == "skipped"
    assert nights.runs()[-1][2] == "skipped"

    # What was due while everything was down ends with a note, and nothing runs.
    nights.commit_params(flow__skip_when_late_minutes=120)
    missed = nights.wait(nights.start(datetime.now(UTC) - timedelta(days=2)), "COMPLETED")
    assert (missed["state_name"], nights.runs()[-1][2:4]) == ("Skipped", ["skipped", ""])
    assert missed["state"]["message"].startswith("48 h ")
    assert [kind for kind, _ in nights.notices()[3:]] == ["skipped"]

    with lock.hold(clone.root, "another"):
        waiting = nights.start()
        nights._until(lambda: runs.read(clone.root)[-1].reason.startswith("run another (process "))
        assert nights.runs()[-1][-1] == runs.read(clone.root)[-1].reason
        # Whoever starts the schedule anew, or asks for the last run, leaves it alone.
        assert f"run {nights.runs()[-1][0]} is at work" in nights.overnight("rerun").complaint()
    assert nights.wait(waiting, "COMPLETED")["state_name"] == "Nothing new"
    assert [kind for kind, _ in nights.notices()] == ["success", "failure", *["skipped"] * 2]
    assert len(nights.runs()) == 5
