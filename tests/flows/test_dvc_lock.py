"""Other DVC commands at work: seen, waited for, and told from what dead ones have left."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import dvc_fork, dvc_lock

# Two words of Python that stay until their input ends; the last one is what a table of locks would hold.
STAY = "import sys; sys.stdin.read()"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A living process that was started as `... repro train`."""
    process = subprocess.Popen([sys.executable, "-c", STAY, "repro", "train"], stdin=subprocess.PIPE)
    yield process
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def write_table(root: Path, pid: int, command: str = "/some where/dvc/__main__.py repro train") -> Path:
    table = root / ".dvc/tmp/rwlock"
    holder = {"pid": pid, "cmd": command}
    table.write_text(json.dumps({"write": {"models/float": holder}, "read": {"data/shards": [holder]}}))
    return table


def test_a_command_that_works_on_files_is_seen_until_it_ends(root: Path, stranger: subprocess.Popen[bytes]) -> None:
    assert dvc_lock.other(root) is None
    write_table(root, stranger.pid)
    found = dvc_lock.other(root)
    assert found is not None
    assert found.pid == stranger.pid
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        stranger.terminate()
        stranger.wait()

    dvc_lock.await_others(root, tell)
    assert len(told) == 1
    assert f"(process {stranger.pid}: " in told[0]
    assert "repro train). Waiting for it to end." in told[0]


def test_who_does_not_wait_is_told_who_is_at_work(
    root: Path, stranger: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvc_lock, "_SECONDS_OF_A_GLANCE", 0.2)
    write_table(root, stranger.pid, "/v/lib/dvc/__main__.py repro train")
    with pytest.raises(dvc_lock.Busy) as caught:
        dvc_lock.check_others(root, "Ask again later.")
    assert str(caught.value) == (
        f"another DVC command is at work in this project (process {stranger.pid}: dvc repro train). Ask again later."
    )
    assert caught.value.exit_code == 75


def test_a_command_that_holds_the_whole_repository_is_seen(root: Path, stranger: subprocess.Popen[bytes]) -> None:
    with (root / ".dvc/tmp/lock").open("w+") as file:
        file.write(f" {stranger.pid}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        found = dvc_lock.other(root)
        assert found is not None
        assert (found.pid, found.alive) == (stranger.pid, True)
    assert dvc_lock.other(root) is None


def test_a_fork_that_holds_the_whole_repository_is_called_what_it_is(root: Path) -> None:
    # A fork has the command line of the process that it comes from.
    forked = [sys.executable, "-c", STAY, dvc_fork._SERVE, "folder", "17"]
    with subprocess.Popen(forked, stdin=subprocess.PIPE) as fork, (root / ".dvc/tmp/lock").open("w+") as file:
        file.write(str(fork.pid))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        found = dvc_lock.other(root)
        assert found is not None
        assert (str(found), found.alive) == (f"process {fork.pid}: dvc", True)


@pytest.mark.parametrize("damaged", [b"", b'{"read": {', b"\xff", b"[]", b'{"write": {"a": 1}}'])
def test_a_table_that_a_killed_command_left_half_written_is_dropped(root: Path, damaged: bytes) -> None:
    table = root / ".dvc/tmp/rwlock"
    table.write_bytes(damaged)
    assert dvc_lock.other(root) is None
    dvc_lock.mend(root)
    assert not table.exists()


def test_a_table_whose_numbers_belong_to_others_after_a_restart_is_dropped(root: Path) -> None:
    # This process lives, and is no `dvc repro train`.
    table = write_table(root, os.getpid())
    dvc_lock.mend(root)
    assert not table.exists()


def test_a_table_of_living_commands_is_left_alone(root: Path, stranger: subprocess.Popen[bytes]) -> None:
    table = write_table(root, stranger.pid)
    dvc_lock.mend(root)
    assert table.exists()


def test_an_empty_table_is_left_alone(root: Path) -> None:
    table = root / ".dvc/tmp/rwlock"
    table.write_text('{"read": {}, "write": {}}')
    dvc_lock.mend(root)
    assert table.exists()
