"""SIGTERM: an orderly end, and an end in any case, each with one line."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

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
TURNED = """
    try:
        work()
    except BaseException:
        raise OSError("connection refused") from None
"""


@pytest.mark.parametrize(
    ("block", "out"),
    [(ORDERLY, "left in order\n"), (STUBBORN, ""), (TURNED, "")],
    ids=["orderly", "stubborn", "turned"],
)
def test_the_end_takes_seconds_and_one_line(block: str, out: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FRAME.format(block=textwrap.dedent(block).replace("\n", "\n    "))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    rest, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode == 143
    assert (rest, err) == (out, "terminated; `overnight rerun` goes on where this run stopped.\n")


def test_without_the_signal_nothing_changes() -> None:
    from flows.termination import sigterm_raises

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="as it was"), sigterm_raises():
        raise ValueError("as it was")
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
