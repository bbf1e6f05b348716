"""One run at a time."""

import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from processes import leave_lock

from flows import lock, supervise
from tasks.errors import EXIT_TRY_AGAIN


def test_a_second_run_is_told_who_holds_the_lock_and_since_when(tmp_path: Path) -> None:
    with lock.hold(tmp_path, "20260101-000000"), pytest.raises(lock.Held) as caught, lock.hold(tmp_path, "other"):
        pass
    assert f"run 20260101-000000 (process {os.getpid()}) is at work in this project since 20" in str(caught.value)
    assert "--wait" in str(caught.value)
    assert caught.value.exit_code == EXIT_TRY_AGAIN


def test_the_lock_is_free_after_a_run_and_names_the_next_one(tmp_path: Path) -> None:
    with lock.hold(tmp_path, "a-rather-long-name-of-a-run"):
        pass
    with lock.hold(tmp_path, "b"):
        assert json.loads((tmp_path / lock.LOCK).read_text())["run"] == "b"


def test_waiting_gets_the_lock_when_the_other_run_has_ended(tmp_path: Path) -> None:
    told: list[str] = []
    entered = threading.Event()
    leave = threading.Event()

    def other() -> None:
        with lock.hold(tmp_path, "first"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)

    def tell(line: str) -> None:
        told.append(line)
        leave.set()

    with lock.hold(tmp_path, "second", wait=True, tell=tell):
        assert len(told) == 1
        assert "first" in told[0]
    thread.join()


@pytest.mark.parametrize("untold", [0.5, 30.0])
def test_a_lock_that_a_dead_run_has_left_to_its_last_child_is_waited_for(
    tmp_path: Path, untold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_SECONDS_UNTOLD", untold)
    leave_lock(tmp_path, seconds=1.5)
    told: list[str] = []
    started = time.monotonic()
    with lock.hold(tmp_path, "next", tell=told.append):
        assert 0.2 < time.monotonic() - started < 10
    # Once, and nothing of what is over in a moment.
    assert [line.partition(",")[0] for line in told] == ["what was at work here has ended"] * (untold < 1)


def test_a_dead_run_is_waited_for_as_long_as_its_training_may_take() -> None:
    assert lock._SECONDS_TO_DIE > supervise.STAGE_GRACE_SECONDS


def test_a_killed_process_that_nobody_has_asked_for_is_dead() -> None:
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = lock.Holder(pid=killed.pid, run="one", since=datetime.now().astimezone())
    assert holder.alive
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
    assert not holder.alive
    killed.communicate()
    assert not holder.alive


def test_who_asks_is_told_the_run_at_work_and_does_not_disturb_it(tmp_path: Path) -> None:
    assert lock.holder(tmp_path) is None
    with lock.hold(tmp_path, "20260101-000000"):
        found = lock.holder(tmp_path)
        assert found is not None
        assert (found.run, found.pid) == ("20260101-000000", os.getpid())
    assert lock.holder(tmp_path) is None
