"""A process that keeps the others waiting is named, and the stage asks to be tried again."""

import dataclasses
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import NoReturn

import disturb
import forked
import psutil
import pytest
import tiny
from torch.distributed import Store
from waiting import until

from tasks import heartbeat
from tasks.errors import EXIT_PEER_LOST, EXIT_TRY_AGAIN
from tasks.heartbeat import Beat, Heartbeat, _Watch, verdict
from tasks.order import batch_of_rank
from tasks.section import read_section
from tasks.shards import Shards, read_manifest
from tasks.train.params import TrainParams

GRADIENTS, AGREEMENT = 1, 2


def beat(moves: int, step: int, part: int, batches: int = 0) -> Beat:
    return Beat(1, moves, step, part, batches, "host", 1)


def later(beat: Beat | None) -> Beat | None:
    return None if beat is None else dataclasses.replace(beat, number=beat.number + 3)


@pytest.mark.parametrize(
    ("beats", "stopped", "expected", "still"),
    [
        (
            [beat(9, 8, AGREEMENT), beat(8, 8, GRADIENTS), beat(9, 8, AGREEMENT)],
            [],
            "rank 1 did not arrive at the agreement of step 8: still at the gradients of step 8",
            [],
        ),
        (
            [beat(9, 8, GRADIENTS), beat(9, 8, GRADIENTS), beat(7, 7, AGREEMENT)],
            [1, 2],
            "ranks 1, 2 did not come through the gradients of step 8: stopped, or gone",
            [1, 2],
        ),
        (
            [beat(9, 8, GRADIENTS, 4), beat(7, 8, GRADIENTS, 2)],
            [],
            "rank 1 is held up in the gradients of step 8, where the others wait",
            [],
        ),
        ([beat(1, 1, GRADIENTS), None], [], "rank 1 did not come through the gradients of step 1", [1]),
        ([beat(9, 8, AGREEMENT), beat(5, 8, AGREEMENT)], [], "no process came through the agreement of step 8", []),
    ],
)
def test_who_is_late_follows_from_two_looks(
    beats: list[Beat | None], stopped: list[int], expected: str, still: list[int]
) -> None:
    before = dict(enumerate(beats))
    after = {rank: one if rank in stopped else later(one) for rank, one in before.items()}
    told, found = verdict(0, before, after)
    assert told.startswith(expected)
    assert found == still


def test_nobody_is_late_while_something_moves() -> None:
    before = {0: beat(9, 8, AGREEMENT), 1: beat(8, 8, GRADIENTS)}
    assert verdict(0, before, {0: later(before[0]), 1: beat(9, 8, GRADIENTS)}) == ("", [])


def test_a_stopped_process_is_named_and_the_stage_ends(tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__steps=100000, train__hang_timeout_seconds=5.0)
    tiny.write_shards(tmp_path)
    process = tiny.stage("train", tmp_path)
    until(lambda: any(tmp_path.glob(".overnight/checkpoints/train/*/*.pt")) or process.poll() is not None, 120)
    assert process.poll() is None, process.communicate()[0]
    workers = psutil.Process(process.pid).children()
    (second,) = [worker for worker in workers if worker.name() == "rank 1"]
    second.send_signal(signal.SIGSTOP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_TRY_AGAIN, output
    told = tiny.error_line(output)
    assert told.startswith("rank 1 did not come through the ")
    assert "; nothing has moved for 5 s (hang_timeout_seconds). Run again to go on from the last checkpoint." in told
    assert not psutil.pid_exists(second.pid)


@pytest.mark.parametrize("late", [0.0, 20.0])
def test_a_process_that_is_held_up_elsewhere_is_named_once(
    late: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_params(tmp_path, train__hang_timeout_seconds=3.0, train__micro_batch=4)
    tiny.write_shards(tmp_path)
    params = read_section("train", TrainParams)
    count = len(Shards(Path("data/shards"), read_manifest(), "train").reader(params.seq_len))
    windows = batch_of_rank(2, count, params.seed, params.global_batch, params.micro_batch, 1, 2)[0]
    log = tmp_path / "log"
    variables = {"LINGERS": ",".join(map(str, windows)), "LATE": str(late)}
    codes = forked.end(forked.start([tmp_path, tmp_path], log, disturb.linger, **variables), 30)
    assert codes == [EXIT_TRY_AGAIN] * 2
    assert tiny.error_line(log.read_text()).startswith("rank 1 is held up in the gradients of step 3, ")


class Told(Store):
    """The store as the one finds it that tells: with each look, another one has heard."""

    def __init__(self, done: list[str]) -> None:
        super().__init__()
        self.done, self.heard = done, 0

    def add(self, key: str, number: int) -> int:
        if number:
            self.done.append("told")
            return 1
        self.heard += 1
        self.done.append(f"heard {self.heard}")
        return self.heard


def test_who_is_stopped_is_killed_when_the_others_have_heard_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    before = {rank: dataclasses.replace(beat(9, 8, GRADIENTS), host=socket.gethostname()) for rank in range(4)}
    looks = iter([before, {rank: one if rank == 1 else later(one) for rank, one in before.items()}])
    watch = _Watch(Told(done), Heartbeat(), threading.Event(), 0, 4, 0.5)
    monkeypatch.setattr(watch, "beat", lambda: None)
    monkeypatch.setattr(watch, "beats_of_all", lambda: next(looks))
    monkeypatch.setattr(os, "kill", lambda process, number: done.append("killed"))

    def end(code: int) -> NoReturn:
        done.append("ended")
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit):
        watch.look()
    assert done == ["told", "heard 1", "heard 2", "killed", "ended"]


@pytest.mark.parametrize(
    ("place", "mesh", "part"),
    [
        ("tasks.train.worker.fill", {}, "the start"),
        ("tasks.parallel.sharded.fill", {"shard": 2}, "the start"),
        ("tasks.train.worker.write_model", {}, "the model's writing"),
        ("tasks.train.worker.write_model", {"shard": 2}, "the model's writing"),
    ],
)
def test_a_process_that_stops_before_or_after_the_steps_is_named_with_the_collective(
    place: str, mesh: dict[str, int], part: str, tmp_path: Path
) -> None:
    tiny.write_params(tmp_path, train__hang_timeout_seconds=2.0, train__steps=4, train__mesh=mesh)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    codes = forked.end(forked.start([tmp_path, tmp_path], log, disturb.stand_still, STANDS_STILL_AT=place), 60)
    assert codes == [EXIT_TRY_AGAIN, -signal.SIGKILL]
    told = tiny.error_line(log.read_text())
    assert told.startswith(f"rank 1 did not come through {part}: stopped, or gone (rank 0 waits in "), told


@pytest.mark.parametrize(
    ("mesh", "wait"),
    [
        ({}, "all_reduce of "),
        ({"shard": 2}, "all"),
        ({"tensor": 2}, "all"),
        ({"pipeline": 2}, "a message from or to another process)"),
    ],
    ids=str,
)
def test_a_process_that_stops_within_a_step_is_named_with_what_is_waited_for(
    mesh: dict[str, int], wait: str, tmp_path: Path
) -> None:
    tiny.write_params(tmp_path, train__hang_timeout_seconds=2.0, train__steps=4, train__mesh=mesh)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    place = "tasks.trainer.batch_of_rank"
    codes = forked.end(forked.start([tmp_path, tmp_path], log, disturb.stand_still, STANDS_STILL_AT=place), 60)
    assert codes == [EXIT_TRY_AGAIN, -signal.SIGKILL]
    told = tiny.error_line(log.read_text())
    assert told.startswith("rank 1 did not come through the gradients of step 1: stopped, or gone (rank 0 waits in ")
    assert f"waits in {wait}" in told


def test_a_process_that_stops_before_it_has_joined_is_named(tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__hang_timeout_seconds=2.0)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    ranks = forked.start([tmp_path, tmp_path], log, disturb.stand_still, STANDS_STILL_AT="tasks.world.tell_apart")
    ranks[0].join(30)
    ranks[1].kill()
    assert ranks[0].exitcode == EXIT_TRY_AGAIN, log.read_text()
    ranks[1].join()
    assert tiny.error_line(log.read_text()).startswith("rank 1 did not join the others within 2 s")


@pytest.mark.parametrize("place", ["tasks.world.tell_apart", "tasks.trainer.batch_of_rank"])
def test_the_first_process_which_keeps_the_store_is_named_too(place: str, tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__hang_timeout_seconds=2.0, train__steps=4)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    how = {"STANDS_STILL_AT": place, "STANDS_STILL": "0"}
    ranks = forked.start([tmp_path, tmp_path], log, disturb.stand_still, **how)
    ranks[1].join(30)
    ranks[0].kill()
    assert ranks[1].exitcode == EXIT_TRY_AGAIN, log.read_text()
    ranks[0].join()
    assert tiny.error_line(log.read_text()).startswith("rank 1: rank 0, or the launcher beside it, does not answer at ")


def test_a_store_that_does_not_answer_keeps_nobody_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()

    class Frozen:
        def set(self, *_: object) -> None:
            pass

        def check(self, _: object) -> bool:
            asked.set()
            answers.wait()
            return False

    monkeypatch.setattr(heartbeat, "_connect", lambda seconds: Frozen())
    monkeypatch.setattr(heartbeat, "_SECONDS_TO_TELL", 0.1)

    def leave() -> None:
        with heartbeat.beating(0, 2, 600.0):
            asked.wait()

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(30)
    ended = not leaving.is_alive()
    answers.set()
    assert ended


def test_a_job_that_was_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__hang_timeout_seconds=2.0, train__steps=30, train__checkpoint_every=2)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    ranks = forked.start([tmp_path, tmp_path], log, disturb.slowly)
    until(lambda: any(tmp_path.glob(".overnight/checkpoints/train/*/*.pt")), told=log.read_text)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            assert rank.pid is not None
            os.kill(rank.pid, number)
        time.sleep(6 if number == signal.SIGSTOP else 0)
    assert forked.end(ranks) == [0, 0], log.read_text()


def test_a_lost_process_is_one_line_for_those_that_remain(tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__steps=100000)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    ranks = forked.start([tmp_path, tmp_path], log)
    until(lambda: any(tmp_path.glob(".overnight/checkpoints/train/*/*.pt")), told=log.read_text)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert forked.end(ranks) == [EXIT_PEER_LOST, -9]
    assert "warning: rank 0: another process is gone: " in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_process_that_goes_before_all_have_joined_is_one_line_too(tmp_path: Path) -> None:
    tiny.write_params(tmp_path)
    tiny.write_shards(tmp_path)
    log = tmp_path / "log"
    ranks = forked.start([tmp_path, tmp_path], log, disturb.lose_a_peer_while_joining)
    assert forked.end(ranks) == [EXIT_PEER_LOST, EXIT_PEER_LOST]
    assert "warning: rank 0: another process is gone: Gloo connectFullMesh failed" in log.read_text()
    assert "Traceback" not in log.read_text()
