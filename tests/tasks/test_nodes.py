"""A training on several machines loses one and goes on; here they are three agents on loopback."""

import itertools
import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import machine
import psutil
import pytest
import tiny
import torch
from checkpoint_files import tensors_of
from ports import free_port
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig

from tasks.errors import EXIT_PEER_LOST, EXIT_STOPPED, EXIT_TRY_AGAIN, EXIT_USER_MISTAKE, BadParameter
from tasks.order import batch_of_rank
from tasks.section import read_section
from tasks.shards import Shards, read_manifest
from tasks.train import nodes
from tasks.train.params import TrainParams

ROOT = Path(__file__).parents[2]
STEPS = 50
RENDEZVOUS = "last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=2"
# Set another seed to try other moments and victims; SIGTERM is a machine that is taken away with notice.
SEED = int(os.environ.get("KILL_SEED", "0"))
LOST_BY = signal.Signals[os.environ.get("LOST_BY", "SIGKILL")]


def write(project: Path, world_size: int, **changes: Any) -> None:
    kept = {
        "train__steps": STEPS,
        "train__global_batch": 24,
        "train__elastic": True,
        "train__precision": "fp32",
        "train__world_size": world_size,
        "train__validate_every": STEPS,
        "train__checkpoint_every": 1,
        "train__keep_checkpoints": STEPS,
    }
    tiny.write_params(project, **{**kept, **changes})


def start(project: Path, log: Path, port: int, **changes: str) -> BaseProcess:
    """Starts one machine of one to three, each with one process."""
    variables = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}",
        "SECONDS_A_STEP": "0.1",
        "PET_NNODES": "1:3",
        "PET_NPROC_PER_NODE": "1",
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}",
        "PET_RDZV_CONF": RENDEZVOUS,
        "PET_MAX_RESTARTS": "5",
        **changes,
    }
    return forked.call(machine.run, project, log, variables)


def taken(project: Path) -> list[list[Any]]:
    """What the workers have noted so far, in the order of time; a killed one may have left half a line."""
    lines = [line for file in project.glob("taken-*") for line in file.read_text().splitlines(keepends=True)]
    return sorted(json.loads(line) for line in lines if line.endswith("\n"))


def wait(project: Path, log: Path, what: Callable[[list[Any]], bool]) -> list[list[Any]]:
    """Waits for a line that is ``what`` is asked for; returns all up to and with it."""
    deadline = time.monotonic() + 240
    while True:
        noted = taken(project)
        for number, line in enumerate(noted):
            if what(line):
                return noted[: number + 1]
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def checkpoint(project: Path, size: int, step: int) -> dict[str, torch.Tensor]:
    (file,) = project.glob(f".overnight/checkpoints/train/*-{size}-1-*/step-{step:09d}-*.pt")
    return tensors_of(file, "model.")


def test_a_machine_is_lost_and_no_window_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    choose = random.Random(SEED)
    write(tmp_path, 3)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    port = free_port()
    # The last one keeps the rendezvous; the first one's process is rank 0 and keeps the store of the first rounds.
    hosts = (f"is_host={is_host},{RENDEZVOUS}" for is_host in ("false", "false", "true"))
    machines = [start(tmp_path, log, port, PET_RDZV_CONF=host) for host in hosts]
    try:
        # A process dies: its machine starts it again, and all go on from the last checkpoint.
        killed_after = choose.randrange(2, 8)
        noted = wait(tmp_path, log, lambda line: line[2] == 3 and line[4] >= killed_after)
        first = noted[-1][1]
        (victim,) = psutil.Process(machines[choose.randrange(3)].pid).children()
        victim.kill()
        noted = wait(tmp_path, log, lambda line: line[1] != first and line[2] == 3)
        again = noted[-1][4]
        noted = wait(tmp_path, log, lambda line: line[2] == 3 and line[4] >= again + 3)

        # A machine is lost: the other two go on.
        lost = machines.pop(0)
        assert lost.pid is not None
        os.kill(lost.pid, LOST_BY)
        lost.join(60)
        assert lost.exitcode == (-LOST_BY if LOST_BY == signal.SIGKILL else EXIT_TRY_AGAIN)
        left_after = noted[-1][4] + choose.randrange(3, 8)
        wait(tmp_path, log, lambda line: line[2] == 2 and line[4] >= left_after)

        for one in machines:
            one.terminate()
        assert forked.end(machines) == [EXIT_TRY_AGAIN] * 2, log.read_text()
    finally:
        for one in machines:
            one.kill()
    assert "told to end (SIGTERM). Run again to go on from the last checkpoint." in log.read_text()

    # What came after the kill has the bytes of a training that nothing disturbed.
    calm = tmp_path / "calm"
    calm.mkdir()
    write(calm, 3)
    tiny.write_shards(calm)
    ranks = forked.start([calm] * 3, calm / "log")
    while not list(calm.glob(f".overnight/checkpoints/train/*/step-{again + 2:09d}-*.pt")):
        time.sleep(0.02)
    ranks[0].terminate()
    assert forked.end(ranks) == [EXIT_STOPPED] * 3, (calm / "log").read_text()
    expected, found = checkpoint(calm, 3, again + 2), checkpoint(tmp_path, 3, again + 2)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    # Four go on with what two have left.
    stopped_after = max(line[4] for line in taken(tmp_path)) + 1
    write(tmp_path, 4, train__checkpoint_every=STEPS)
    assert forked.end(forked.start([tmp_path] * 4, log, machine.note_what_is_taken)) == [0] * 4, log.read_text()
    assert json.loads((tmp_path / "models/train.json").read_text())["processes_in_turn"][-3:] == [3, 2, 4]

    # The last round that took a step is the one whose step counts.
    steps: dict[int, dict[str, list[list[Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in taken(tmp_path):
        steps[line[4]][line[1]].append(line)
    params = read_section("train", TrainParams)
    count = len(Shards(Path("data/shards"), read_manifest(), "train").reader(params.seq_len))
    assert sorted(steps) == list(range(STEPS))
    for step, by_round in steps.items():
        last = max(by_round.values(), key=lambda lines: max(line[0] for line in lines))
        windows = batch_of_rank(step, count, params.seed, params.global_batch, params.micro_batch, 0, 1)
        assert sorted(itertools.chain(*(line[5] for line in last))) == sorted(windows.flatten().tolist())
        assert last[0][2] == len(last) == (4 if step >= stopped_after else len(last))


def test_two_machines_write_what_one_does(tmp_path: Path, trained: Path) -> None:
    apart = tmp_path / "apart"
    apart.mkdir()
    tiny.write_params(apart)
    tiny.write_shards(apart)
    port = free_port()
    machines = [start(apart, tmp_path / "log", port, PET_NNODES="2", SECONDS_A_STEP="0") for _ in range(2)]
    assert forked.end(machines, 120) == [0, 0], (tmp_path / "log").read_text()
    assert tiny.files_of(apart / "models") == tiny.files_of(trained / "models")


def test_a_port_that_another_program_has_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, 3)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        first = start(tmp_path, log, port, PET_RDZV_CONF=f"is_host=true,{RENDEZVOUS}")
        assert forked.end([first], 60) == [EXIT_TRY_AGAIN], log.read_text()
    (told,) = log.read_text().splitlines()
    assert f"the machines do not find each other at 127.0.0.1:{port}: " in told
    assert "another program has the port (The server socket has failed to listen" in told
    assert told.endswith("address already in use). Run again on all to go on from the last checkpoint.")


@pytest.mark.parametrize(
    ("codes", "told", "left"),
    [
        ([-9], False, 3),
        ([EXIT_PEER_LOST], False, 3),
        ([EXIT_TRY_AGAIN], False, 3),
        # Another machine was told to end.
        ([EXIT_STOPPED, EXIT_STOPPED], False, 4),
        # This one was.
        ([EXIT_STOPPED], True, 0),
        ([-9, EXIT_USER_MISTAKE], False, 0),
    ],
)
def test_a_machine_starts_again_for_what_may_pass(
    codes: list[int], told: bool, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in enumerate(codes)}
    result = RunResult(WorkerState.FAILED, failures=failures)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: result)
    agent = nodes._Agent.__new__(nodes._Agent)
    agent._remaining_restarts, agent._told = 3, threading.Event()
    if told:
        agent._told.set()
    agent._monitor_workers(None)  # type: ignore[arg-type]
    assert agent._remaining_restarts == left


@pytest.mark.parametrize("told", [False, True])
def test_a_machine_that_is_told_to_end_leaves_the_rendezvous_open(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    config = LaunchConfig(1, 3, 1, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0")
    handler = SimpleNamespace(shutdown=lambda: closed.append(True))
    monkeypatch.setattr(nodes.rendezvous, "get_rendezvous_handler", lambda parameters: handler)
    failed = RunResult(WorkerState.FAILED, failures={0: ProcessFailure(0, 1, 1, "")})
    event = threading.Event()

    def run(self: nodes._Agent) -> RunResult:
        if told:
            event.set()
        return failed

    monkeypatch.setattr(nodes._Agent, "run", run)
    with pytest.raises(ChildFailedError):
        nodes._run(config, "module", event)
    assert closed == ([] if told else [True])


MANY = {"PET_NNODES": "1:3", "PET_RDZV_ENDPOINT": "127.0.0.1:1"}


@pytest.mark.parametrize(
    ("variables", "changes", "reason"),
    [
        ({"PET_NNODES": "2"}, {}, "Set PET_RDZV_ENDPOINT to HOST:PORT of the first one."),
        (MANY, {"train__elastic": False}, "PET_NNODES is 1:3, and train.elastic is false. Set it to true, or ask for"),
        (MANY, {"world_size": 2}, "train.world_size 2 does not divide over 3 machines. Make it a multiple"),
        (
            {**MANY, "PET_NNODES": "1:4"},
            {"world_size": 4, "train__global_batch": 8},
            "So it is with 3 of 1:4 machines (PET_NNODES); a global_batch that is a multiple of 24 divides over each",
        ),
        (
            {**MANY, "PET_NNODES": "3", "PET_NPROC_PER_NODE": "2"},
            {"train__elastic": False},
            "train.world_size is 3, and 6 processes were started. Set it to 6, or train.elastic to true.",
        ),
        ({**MANY, "PET_MAX_RESTARTS": "many"}, {}, "torchrun does not take its variables PET_...: "),
    ],
)
def test_machines_that_cannot_train_together_are_one_line(
    variables: dict[str, str],
    changes: dict[str, Any],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, **{"world_size": 3, **changes})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadParameter) as refused:
        nodes.asked(read_section("train", TrainParams, tmp_path / "params.yaml"), variables)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("variables", "expected"), [({}, 110), ({"PET_SHUTDOWN_TIMEOUT": "5"}, 5)], ids=str)
def test_a_machine_s_processes_have_stop_seconds_until_they_are_killed(
    variables: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 3, train__stop_seconds=100.0)
    for name, value in {**MANY, **variables}.items():
        monkeypatch.setenv(name, value)
    config = nodes.asked(read_section("train", TrainParams, tmp_path / "params.yaml"), {**MANY, **variables})
    assert config is not None
    assert config.shutdown_timeout == expected


def test_one_machine_asks_for_none(tmp_path: Path) -> None:
    tiny.write_params(tmp_path)
    assert nodes.asked(read_section("train", TrainParams, tmp_path / "params.yaml"), {"PET_NNODES": "1"}) is None


@pytest.mark.parametrize("wanted", ["", "logs"])
def test_no_folder_is_left_but_where_one_is_asked_for(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2)
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    variables = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "127.0.0.1:1", "PET_NPROC_PER_NODE": "1"}
    if wanted:
        variables["PET_LOG_DIR"] = str(place / wanted)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = nodes.asked(read_section("train", TrainParams, tmp_path / "params.yaml"), variables)
    assert config is not None
    assert config.logs_specs is not None
    workers = {0: {"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "0"}}
    config.logs_specs.reify(workers)
    assert [path.name for path in place.iterdir()] == ([wanted] if wanted else [])
