"""SIGKILL at a random moment, then `overnight run`: the same bytes as if nothing had happened."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chain import STAGES, Chain, Ended

if TYPE_CHECKING:
    from conftest import Reference

# Set another seed to try other moments.
SEED = int(os.environ.get("SCENARIO_SEED", "0"))


def kill(chain: Chain, stage: str, moment: float) -> Ended:
    """Runs until ``stage`` is ``moment`` seconds old and kills it then."""
    arguments: tuple[str, ...] = ()
    for _ in range(5):
        running = chain.start("run", *arguments)
        killed = running.kill_stage(stage, moment)
        ended = running.end()
        if killed and ended.code:
            return ended
        # The stage was quicker than in the undisturbed run: once more, and earlier.
        assert ended.code == 0, ended.err
        arguments, moment = ("--from", stage, "--force"), moment / 2
    raise AssertionError(f"{stage} ended before it could be killed")


@pytest.mark.timeout(900)
def test_a_kill_in_every_stage_changes_nothing_in_the_end(fresh: Chain, server: str, reference: "Reference") -> None:
    chain = fresh.at(server)
    draw = random.Random(SEED)
    for stage in STAGES:
        moment = draw.uniform(0, reference.seconds[stage])
        print(f"{stage}: killed after {moment:.3f} of {reference.seconds[stage]:.3f} s (seed {SEED})")
        ended = kill(chain, stage, moment)
        assert ended.code == 1, ended.err
        assert ended.complaint().startswith(f"{stage}: its process was killed by SIGKILL")
        assert ended.outcomes()[stage] == "failed"
        assert set(list(ended.outcomes().values())[2 + STAGES.index(stage) :]) <= {"skipped"}
        # What lies there is whole: no file is other than it should be.
        written = chain.version()
        written.pop("dvc.lock", None)
        assert written.items() <= reference.version.items()
    ended = chain.overnight("run")
    assert ended.code == 0, ended.err
    # All but the last had been mended on the way.
    assert list(ended.outcomes().values())[:-1] == ["cached"] * len(STAGES)
    assert chain.version() == reference.version


def test_a_killed_training_is_retried_and_goes_on_from_its_last_checkpoint(
    finished: Chain, server: str, reference: "Reference"
) -> None:
    finished.forget_from("train")
    finished.set("flow.retries", {"train": 1})
    running = finished.at(server).start("run")
    training = running.stage_process("train")
    assert training is not None
    running.wait_for_checkpoint("train", 12)
    training.kill()
    checkpoint = finished.checkpoints("train")[-1]
    ended = running.end()
    assert ended.code == 0, ended.err
    assert "attempt 2 starts" in ended.err
    assert ended.first_steps("train") == [1, checkpoint + 1]
    assert finished.version() == reference.version


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
