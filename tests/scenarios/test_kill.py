"""Every stage is killed and terminated, and `overnight rerun` ends with the bytes of a run that nothing disturbed."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from chain import STAGES, Chain, Ended, Running, signal_at

if TYPE_CHECKING:
    from conftest import Reference

# Set another seed to try other moments.
SEED = int(os.environ.get("SCENARIO_SEED", "0"))
SIGNALS = [signal.SIGKILL, signal.SIGTERM]
_SECONDS_OF_STEPS = 0.2


@pytest.mark.timeout(900)
def test_stages_killed_and_terminated_change_nothing_in_the_end(
    fresh: Chain, server: str, reference: "Reference"
) -> None:
    chain = fresh.at(server)
    # The first signal is mended by the retry within the run, the second one ends the run.
    chain.set("flow.retries", dict.fromkeys(STAGES, 1))
    draw = random.Random(SEED)
    command = ["run"]
    for index, stage in enumerate(STAGES):
        signals = SIGNALS[:: 1 if (index + SEED) % 2 else -1]
        # A training is stopped at a checkpoint, or a few steps later: what it takes after that is not for long.
        longest = _SECONDS_OF_STEPS if stage == "train" else reference.seconds[stage]
        moments = [draw.uniform(0, longest) for _ in signals]
        ended = stop_twice(chain, command, stage, signals, moments)
        assert ended.code == 1, ended.err
        killed = f"{stage}: its process was killed by {signals[1].name}"
        # A training that is told to end says so itself.
        told = [f"{stage}: told to end (SIGTERM)"] if signals[1] == signal.SIGTERM else []
        assert ended.complaint().startswith((killed, *told))
        assert ended.err.splitlines()[-2].startswith("Go on with: overnight rerun ")
        assert ended.outcomes()[stage] == "failed"
        assert set(list(ended.outcomes().values())[2 + index :]) <= {"skipped"}
        # What lies there is whole: no file is other than it should be.
        written = chain.version()
        written.pop("dvc.lock", None)
        assert written.items() <= reference.version.items()
        command = ["rerun"]
    ended = chain.overnight("rerun")
    assert ended.code == 0, ended.err
    # All but the last had been mended on the way. A run that was begun anew at a stage does not look before it.
    *mended, last = list(ended.outcomes().values())[1:]
    assert set(mended) <= {"cached", "skipped"}
    assert last == "ran"
    assert chain.version() == reference.version
    # Seven attempts or more, and one run.
    (listed,) = chain.overnight("runs").out.splitlines()
    assert listed.split("\t")[2] == "completed"


def test_collecting_killed_and_terminated_changes_nothing_in_the_end(
    finished: Chain, server: str, reference: "Reference"
) -> None:
    chain = finished.at(server)
    shutil.rmtree(chain.root / "data/raw")
    (chain.root / "data/raw.dvc").unlink()
    draw = random.Random(SEED)
    command = "run"
    for number in SIGNALS:
        running = chain.start(command)
        process = running.stage_process("collect")
        assert process is not None
        moment = draw.uniform(0, 0.2)
        print(f"collect: {number.name} after {moment:.3f} s (seed {SEED})")
        assert signal_at(process, number, moment)
        ended = running.end()
        assert ended.code == 1, ended.err
        assert ended.complaint().startswith(f"collect: its process was killed by {number.name}")
        assert ended.outcomes()["collect"] == "failed"
        command = "rerun"
    ended = chain.overnight("rerun")
    assert ended.code == 0, ended.err
    assert list(ended.outcomes().values()) == ["ran", *["cached"] * len(STAGES)]
    assert chain.version() == reference.version


def stop_twice(
    chain: Chain, command: list[str], stage: str, signals: list[signal.Signals], moments: list[float]
) -> Ended:
    """Runs until ``stage`` was sent the first signal, and its second attempt the second one."""
    for _ in range(5):
        running = chain.start(*command)
        first = running.stage_process(stage)
        stopped = first is not None and stop(chain, running, stage, first, signals[0], moments[0])
        second = running.stage_process(stage, later_than=first) if stopped else None
        # SIGTERM leaves one more.
        checkpoint = max(chain.checkpoints(stage), default=0)
        stopped = second is not None and stop(chain, running, stage, second, signals[1], moments[1])
        ended = running.end()
        if stopped and ended.code:
            assert "; attempt 2 starts" in ended.err
            if stage == "train":
                assert ended.first_steps("train") == [1, checkpoint + 1]
            return ended
        # The stage was quicker than in the undisturbed run: once more, and earlier.
        assert ended.code == 0, ended.err
        command, moments = ["rerun", "--from", stage, "--force"], [moment / 2 for moment in moments]
    raise AssertionError(f"{stage} ended before it could be stopped")


def stop(
    chain: Chain, running: Running, stage: str, process: psutil.Process, number: signal.Signals, moment: float
) -> bool:
    if stage == "train":
        # At a checkpoint that it will go on from.
        running.wait_for_checkpoint("train", max(chain.checkpoints("train"), default=0) + 4)
    print(f"{stage}: {number.name} after {moment:.3f} s (seed {SEED})")
    return signal_at(process, number, moment)


# Kills the process that it is loaded into at call number CRASH_AT, counting before and after each renaming of a file.
CRASH = """
import os, signal
left = int(os.environ["CRASH_AT"])
def count():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
def counted(real):
    def call(*arguments, **more):
        count()
        result = real(*arguments, **more)
        count()
        return result
    return call
os.rename, os.replace = counted(os.rename), counted(os.replace)
"""


@pytest.mark.parametrize("stage", ["ingest", "shard", "card"])
def test_a_kill_before_or_after_any_renaming_changes_nothing(
    finished: Chain, reference: "Reference", tmp_path: Path, stage: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    for call in itertools.count(1):
        for output in finished.outputs(stage):
            # As DVC does before it runs a stage.
            shutil.rmtree(output, ignore_errors=True)
        environment = finished.environment(CRASH_AT=str(call), PYTHONPATH=str(tmp_path))
        command = [sys.executable, "-m", f"tasks.{stage}"]
        done = subprocess.run(command, cwd=finished.root, env=environment, capture_output=True, text=True)
        assert finished.version().items() <= reference.version.items()
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    # A folder is renamed once at least: killed before, killed after, undisturbed.
    assert call >= 3
    assert finished.version() == reference.version
