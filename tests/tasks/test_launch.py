"""How the processes of a stage are started on one machine, and how they end together."""

import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import psutil
import pytest
import ranks
from waiting import until

from tasks.errors import EXIT_TRY_AGAIN
from tasks.launch import worker_environment


def start(folder: Path, do: str, device: str = "cpu", **variables: str) -> BaseProcess:
    place = {"PYTHONPATH": os.pathsep.join([str(Path(ranks.__file__).parent), str(Path(__file__).parents[2])])}
    return forked.call(ranks.start, folder, folder / "log", {"DO": do, "DEVICE": device, **place, **variables})


def pids(folder: Path) -> list[int]:
    """Waits until both ranks are at work."""
    files = [folder / f"rank-{rank}" for rank in (0, 1)]
    until(lambda: all(file.exists() and file.read_text() for file in files), told=(folder / "log").read_text)
    return [int(file.read_text()) for file in files]


# For CUDA each process is started anew; these do not touch a GPU.
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranks_find_each_other(tmp_path: Path, device: str) -> None:
    assert forked.end([start(tmp_path, "meet", device)]) == [0], (tmp_path / "log").read_text()
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["0 of 2: 3", "1 of 2: 3"]


def test_a_level_of_torch_s_log_that_is_set_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    assert worker_environment(1)["TORCH_CPP_LOG_LEVEL"] == "INFO"
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    assert worker_environment(1)["TORCH_CPP_LOG_LEVEL"] == "ERROR"


def test_one_that_fails_takes_the_others_along_and_is_named(tmp_path: Path) -> None:
    assert forked.end([start(tmp_path, "fail")]) == [1]
    assert (
        "RuntimeError: of the processes of ranks failed, by rank, with exit code: {1: 3}"
        in (tmp_path / "log").read_text()
    )
    assert not any(map(psutil.pid_exists, pids(tmp_path)))


def test_one_that_does_not_end_is_killed_after_stop_seconds(tmp_path: Path) -> None:
    assert forked.end([start(tmp_path, "fail deaf", STOP_SECONDS="0.5")], 25) == [1]
    assert not any(map(psutil.pid_exists, pids(tmp_path)))


@pytest.mark.parametrize(
    ("number", "code", "device"),
    [
        (signal.SIGINT, 128 + signal.SIGINT, "cpu"),
        (signal.SIGHUP, 128 + signal.SIGHUP, "cpu"),
        (signal.SIGTERM, EXIT_TRY_AGAIN, "cpu"),
        (signal.SIGTERM, EXIT_TRY_AGAIN, "cuda"),
        (signal.SIGKILL, -signal.SIGKILL, "cpu"),
    ],
)
def test_no_rank_outlives_its_launcher(tmp_path: Path, number: int, code: int, device: str) -> None:
    launcher = start(tmp_path, "wait", device)
    workers = [psutil.Process(pid) for pid in pids(tmp_path)]
    assert launcher.pid is not None
    os.kill(launcher.pid, number)
    assert forked.end([launcher]) == [code], (tmp_path / "log").read_text()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    launcher = start(tmp_path, "wait")
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    assert forked.end([launcher]) == [EXIT_TRY_AGAIN]
    assert "error: the process of rank 0 was killed by SIGKILL" in (tmp_path / "log").read_text()
