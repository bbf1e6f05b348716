"""SIGKILL at a random moment, then `overnight run`: the same bytes as if nothing had happened."""

import os
import random
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
        if killed:
            return ended
        # The stage was quicker than in the undisturbed run: once more, and earlier.
        assert ended.code == 0, ended.err
        arguments, moment = ("--from", stage, "--force"), moment / 2
    raise AssertionError(f"{stage} ended before it could be killed")


@pytest.mark.timeout(900)
def test_a_kill_in_every_stage_changes_nothing_in_the_end(fresh: Chain, reference: "Reference") -> None:
    chain = fresh
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
        written = {name: content for name, content in chain.version().items() if "/.partial-" not in name}
        written.pop("dvc.lock", None)
        assert written.items() <= reference.version.items()
    ended = chain.overnight("run")
    assert ended.code == 0, ended.err
    assert ended.outcomes() == {
        "collect": "cached", **dict.fromkeys(STAGES[:-1], "cached"), "card": "ran"
    }  # fmt: skip
    assert chain.version() == reference.version


def test_a_killed_training_is_retried_and_goes_on_from_its_last_checkpoint(
    finished: Chain, reference: "Reference"
) -> None:
    finished.forget_from("train")
    finished.set("flow.retries", {"train": 1})
    running = finished.start("run")
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
