"""What waits for somebody who never answers is ended; what reads, writes or computes is not, however long it takes."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from flows import process
from flows.stall import Stalled

_SECONDS = 0.8
_SLOWLY = "import sys, time\nfor _ in range(15):\n    time.sleep(0.15)\n    {}\n"


def run(tmp_path: Path, program: str, seconds: float) -> int:
    command = [sys.executable, "-c", program]
    return process.run(command, tmp_path / "log", os.environ, lambda event: None, seconds_to_move=seconds)


def test_a_process_that_only_waits_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    program = "import subprocess\nsubprocess.run(['sleep', '987.6'])"
    with pytest.raises(Stalled, match=r"^nothing was read or written for 1 s, so it was ended$"):
        run(tmp_path, program, _SECONDS)
    assert not [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "987.6"]]


@pytest.mark.parametrize(
    "work",
    [
        "open('/dev/zero', 'rb').read(100)",
        "open('/dev/null', 'wb').write(bytes(100))",
        "__import__('os').posix_spawn('/bin/true', ['true'], {})",
    ],
    ids=["reads", "writes", "starts others"],
)
def test_a_process_that_moves_a_little_now_and_then_may_take_longer_than_the_limit(tmp_path: Path, work: str) -> None:
    assert run(tmp_path, _SLOWLY.format(work), _SECONDS) == 0


def test_a_process_that_only_computes_may_take_longer_than_the_limit(tmp_path: Path) -> None:
    program = "import time\nend = time.process_time() + 4\nwhile time.process_time() < end: pass"
    assert run(tmp_path, program, 3.0) == 0
