"""SIGTERM: an orderly end, and an end in any case, each with one line."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from processes import ENDS_SLOWLY

FRAME = """
import os, signal, sys, time
from flows import termination
termination._SECONDS_TO_END = 1.0

def work():
    print("at work", flush=True)
    time.sleep(60)

with termination.sigterm_raises():
{block}
print("never reached")
"""
ORDERLY = """
    try:
        work()
    finally:
        print("left in order", flush=True)
"""
# As Prefect, whose handler comes first and whose server is gone.
STUBBORN = """
    def handle(*_):
        time.sleep(0.3)
        print("a long complaint", file=sys.stderr)
        time.sleep(60)
    signal.signal(signal.SIGTERM, handle)
    work()
"""
# As a training that writes a checkpoint of its step, under a Prefect whose server is gone.
AT_WORK = """
    import threading
    from pathlib import Path
    from flows import process
    def handle(*_):
        time.sleep(60)
    signal.signal(signal.SIGTERM, handle)
    os.chdir({folder!r})
    command = [sys.executable, "-c", {code!r}]
    run = threading.Thread(target=process.run, args=(command, Path("train.log"), os.environ, print), daemon=True)
    run.start()
    while not Path("up").exists():
        time.sleep(0.02)
    work()
"""
TURNED = """
    try:
        work()
    except BaseException:
        raise OSError("connection refused") from None
"""


def at_work(block: str) -> "subprocess.Popen[str]":
    """Returns the process of :data:`FRAME` with ``block``, at work."""
    process = subprocess.Popen(
        [sys.executable, "-c", FRAME.format(block=textwrap.dedent(block).replace("\n", "\n    "))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


@pytest.mark.parametrize(
    ("block", "out"),
    [(ORDERLY, "left in order\n"), (STUBBORN, ""), (TURNED, "")],
    ids=["orderly", "stubborn", "turned"],
)
def test_the_end_takes_seconds_and_one_line(block: str, out: str) -> None:
    process = at_work(block)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    rest, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode == 143
    assert (rest, err) == (out, "terminated; `overnight rerun` goes on where this run stopped.\n")


def test_a_stage_at_work_is_told_at_once_and_has_time_for_a_checkpoint(tmp_path: Path) -> None:
    process = at_work(AT_WORK.format(folder=str(tmp_path), code=ENDS_SLOWLY))
    process.send_signal(signal.SIGTERM)
    since = time.monotonic()
    _, err = process.communicate(timeout=40)
    # Longer than others have, and no longer than it takes.
    assert 4 < time.monotonic() - since < 20
    told, last = err.splitlines()
    assert told.endswith(" train: told to end; it may take up to 35 s: a training writes a checkpoint first.")
    assert (process.returncode, last) == (143, "terminated; `overnight rerun` goes on where this run stopped.")
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize("block", [ORDERLY, AT_WORK], ids=["orderly", "at work"])
def test_whoever_read_what_it_says_may_be_gone(block: str, tmp_path: Path) -> None:
    process = at_work(block.format(folder=str(tmp_path), code=ENDS_SLOWLY))
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (tmp_path / "left").exists() == (block == AT_WORK)


def test_without_the_signal_nothing_changes() -> None:
    from flows.termination import sigterm_raises

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="as it was"), sigterm_raises():
        raise ValueError("as it was")
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
