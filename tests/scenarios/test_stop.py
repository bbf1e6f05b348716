"""The run is terminated, then killed, then the machine goes down, then the server: four attempts, the same bytes."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chain import STAGES, Chain, Running
from prefect_server import PrefectServer

if TYPE_CHECKING:
    from conftest import Reference


@pytest.fixture
def own_server(tmp_path: Path, prefect_database: Path) -> Iterator[PrefectServer]:
    """A server that may be killed."""
    with PrefectServer(tmp_path / "server", prefect_database) as started:
        yield started


@pytest.mark.timeout(900)
def test_a_forced_run_is_terminated_then_all_goes_down_then_the_server_goes_and_comes_back(
    finished: Chain, own_server: PrefectServer, reference: "Reference"
) -> None:
    chain = finished.at(own_server.api)

    terminated = chain.start("run", "--force")
    terminated.wait_for_checkpoint("train", 4)
    # The checkpoints that lie there at the start are none of this run.
    terminated.process.send_signal(signal.SIGTERM)
    assert chain.seconds_until_empty() < 10
    ended = terminated.end()
    assert ended.code == 143
    assert ended.err.splitlines()[-1].endswith(" terminated; `overnight rerun` goes on where this run stopped.")
    assert "Traceback" not in ended.err
    assert "error:" not in ended.err
    checkpoint = chain.checkpoints("train")[-1]
    assert last_run(chain)[2:4] == ["stopped", "train"]
    assert last_run(chain)[6] == "terminated (SIGTERM) at train"

    # The flow alone: what it has started ends with it.
    alone = chain.start("rerun")
    assert alone.stage_process("train") is not None
    alone.process.kill()
    assert chain.seconds_until_empty() < 10
    alone.end()
    checkpoint = chain.checkpoints("train")[-1]
    assert last_run(chain)[2:4] == ["killed", "train"]

    killed = chain.start("rerun")
    killed.wait_for_checkpoint("train", checkpoint + 4)
    # What is asked meanwhile may take longer than the training.
    halt(chain)
    assert f"(process {killed.process.pid}); there is nothing to go on with" in refused(chain, "rerun")
    go_down(chain, own_server, killed)
    ended = killed.end()
    assert ended.first_steps("train") == [checkpoint + 1]
    # What was forced and had finished is not done again.
    assert ended.err.count("ingest    cached") == ended.err.count("shard     cached") == 1, ended.err
    checkpoint = chain.checkpoints("train")[-1]
    assert checkpoint < 40, "the training had ended before it was stopped"
    assert f"train: stopped: at step {checkpoint} of 40" in chain.overnight("status").out.splitlines()
    assert last_run(chain)[2:4] == ["killed", "train"]
    assert "no Prefect server answers there" in refused(chain, "rerun")

    own_server.start()
    again = chain.start("rerun")
    again.wait_for_checkpoint("train", checkpoint + 4)
    own_server.kill()
    time.sleep(0.5)
    own_server.start()
    ended = again.end()
    assert ended.code == 0, ended.err
    assert ended.first_steps("train") == [checkpoint + 1]
    assert chain.version() == reference.version
    (flow_run,) = [run for run in own_server.ask("flow_runs/filter", {}) if run["name"] == last_run(chain)[0]]
    assert (flow_run["state_name"], flow_run["run_count"]) == ("Completed", 4)
    assert len(chain.overnight("runs").out.splitlines()) == 2
    assert "there is nothing to go on with" in refused(chain, "rerun")

    # The server does not come back in time: a minute or two in earnest, seconds here.
    repeated = chain.start("rerun", "--from", "card", "--force", PREFECT_CLIENT_MAX_RETRIES="1")
    assert repeated.stage_process("card") is not None
    own_server.kill()
    ended = repeated.end()
    assert ended.code == 75
    assert ended.complaint().startswith(f"Prefect's server at {own_server.api} went away")
    assert "Error logging" not in ended.err
    own_server.start()
    ended = chain.overnight("rerun")
    assert ended.code == 0, ended.err
    assert list(ended.outcomes().values()) == [*["skipped"] * len(STAGES), "cached"]
    assert chain.version() == reference.version
    assert last_run(chain)[2] == "completed"


def go_down(chain: Chain, server: PrefectServer, running: Running) -> None:
    """Kills all there is at once, and leaves what processes leave that die in the middle of a write."""
    halt(chain)
    server.kill()
    for process in chain.processes():
        os.kill(process.pid, signal.SIGKILL)
    assert chain.seconds_until_empty() < 10
    (chain.root / ".dvc/tmp/rwlock").write_text('{"read": {"')
    (chain.root / ".dvc/tmp/lock").write_text(f" {running.process.pid}\n")
    (chain.root / ".git/index.lock").touch()


def halt(chain: Chain) -> None:
    for process in chain.processes():
        os.kill(process.pid, signal.SIGSTOP)


def refused(chain: Chain, *arguments: str) -> str:
    """Runs a command that must say in one line why it does nothing."""
    ended = chain.overnight(*arguments)
    assert (ended.code, len(ended.err.splitlines())) in ((2, 1), (75, 1)), ended
    return ended.complaint()


def last_run(chain: Chain) -> list[str]:
    """The fields of the last line of `overnight runs`: run, started, state, stage, duration, version, why."""
    return chain.overnight("runs").out.splitlines()[-1].split("\t")
