"""Twenty kills at random moments, of one process or all, change no byte of what a training writes.

Some more where each process has a half of the model, and writes a part of each checkpoint.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import disturb
import forked
import pytest
import tiny

# Set another seed to try other moments, another number of them to try more.
SEED = int(os.environ.get("KILL_SEED", "0"))
KILLS = int(os.environ.get("KILLS", "20"))
STEPS = 200


def saved(project: Path) -> int:
    files = project.glob(".overnight/checkpoints/train/*/step-*.pt")
    return max((int(path.name.split("-")[1]) for path in files), default=0)


@pytest.mark.parametrize(("shard", "kills"), [(1, KILLS), (2, KILLS // 4)])
def test_kills_change_nothing(shard: int, kills: int, tmp_path: Path) -> None:
    steps = STEPS * kills // KILLS
    calm, project, log = tmp_path / "calm", tmp_path / "project", tmp_path / "log"
    calm.mkdir()
    often = {"train__steps": steps, "train__validate_every": 50, "train__checkpoint_every": 2}
    tiny.write_params(calm, train__mesh__shard=shard, **often)
    tiny.write_shards(calm)
    shutil.copytree(calm, project)
    assert forked.end(forked.start([calm, calm], log, disturb.draw)) == [0, 0], log.read_text()
    choose = random.Random(SEED)
    done = []
    for _ in range(kills):
        before = saved(project)
        ranks = forked.start([project, project], log, disturb.draw)
        # Mostly somewhere in the steps after a checkpoint of this attempt's own, else wherever it is by then.
        if choose.random() < 0.8:
            deadline = time.monotonic() + 60
            while saved(project) <= before:
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.002)
        time.sleep(choose.uniform(0, 0.03))
        victims = choose.choice([ranks, ranks[:1], ranks[1:]])
        for victim in victims:
            assert victim.pid is not None
            os.kill(victim.pid, choose.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        for rank in ranks:
            # One that has not met the other yet would wait for it; torchrun ends it as well.
            rank.join(2)
            rank.kill()
        forked.end(ranks)
        assert not (project / "models/train.json").exists(), "the training had ended before it was killed; raise STEPS"
        done.append(saved(project))
    # Each attempt went on from the one before, and none began anew.
    assert done == sorted(done)
    assert len(set(done)) > kills // 2
    assert forked.end(forked.start([project, project], log, disturb.draw)) == [0, 0], log.read_text()
    assert tiny.files_of(project / "models") == tiny.files_of(calm / "models")
