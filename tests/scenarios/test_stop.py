"""The flow itself is terminated or killed in the middle of a training."""

import signal
from typing import TYPE_CHECKING

from chain import Chain

if TYPE_CHECKING:
    from conftest import Reference


def test_a_stopped_flow_leaves_no_process_and_the_next_one_ends_with_the_same_bytes(
    finished: Chain, reference: "Reference"
) -> None:
    finished.forget_from("train")

    terminated = finished.start("run")
    terminated.wait_for_checkpoint("train", 4)
    terminated.process.send_signal(signal.SIGTERM)
    assert finished.seconds_until_empty() < 10
    ended = terminated.end()
    assert ended.code == 143
    assert ended.err.splitlines()[-1] == "terminated; `overnight run` goes on where this run stopped."
    assert "Traceback" not in ended.err
    assert "error:" not in ended.err
    checkpoint = finished.checkpoints("train")[-1]

    killed = finished.start("run")
    killed.wait_for_checkpoint("train", checkpoint + 4)
    killed.process.kill()
    assert finished.seconds_until_empty() < 10
    ended = killed.end()
    assert ended.code == -signal.SIGKILL
    assert ended.first_steps("train") == [checkpoint + 1]
    checkpoint = finished.checkpoints("train")[-1]
    assert checkpoint < 40, "the training had ended before it was stopped"

    ended = finished.overnight("run")
    assert ended.code == 0, ended.err
    assert ended.first_steps("train") == [checkpoint + 1]
    assert finished.version() == reference.version
