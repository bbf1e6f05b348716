"""Nothing survives: neither the command, nor what it started, nor what that moved into a session of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ENDS_SLOWLY, within

from flows import process, supervise
from flows.process import Child
from tasks.progress import Event

# Starts a worker in its own session, as torchrun does, which ignores SIGTERM and starts another.
FAMILY = """
import os, pathlib, signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
inner = deaf + "time.sleep(600)"
outer = deaf + f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}]); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", outer], start_new_session=True)
pathlib.Path("up").write_text("")
{end}
"""


def wait_for(members_wanted: int, folder: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while len(within(folder)) < members_wanted:
        assert time.monotonic() < deadline, within(folder)
        time.sleep(0.05)


def until_gone(folder: Path) -> float:
    started = time.monotonic()
    while left := within(folder):
        assert time.monotonic() - started < 15, left
        time.sleep(0.05)
    return time.monotonic() - started


def start(folder: Path, end: str) -> "subprocess.Popen[bytes]":
    """Starts a flow that supervises the family; four processes: flow's child, supervisor not counted, worker, inner."""
    (folder / "family.py").write_text(FAMILY.replace("{end}", end))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", supervise.__file__, "-", "3", sys.executable, "family.py"],
        cwd=folder,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path.resolve()


def test_the_end_of_the_flow_ends_every_descendant_within_ten_seconds(folder: Path) -> None:
    supervisor = start(folder, "time.sleep(600)")
    wait_for(4, folder)
    assert supervisor.stdin is not None
    # What the kernel does to the pipe when the flow dies, however it dies.
    supervisor.stdin.close()
    assert until_gone(folder) < 10
    assert supervisor.wait() == supervise.STOPPED


def test_sigterm_ends_every_descendant_within_ten_seconds(folder: Path) -> None:
    supervisor = start(folder, "time.sleep(600)")
    wait_for(4, folder)
    supervisor.terminate()
    assert until_gone(folder) < 10
    assert supervisor.wait() == supervise.STOPPED


def test_a_command_that_ends_leaves_no_daemon(folder: Path) -> None:
    supervisor = start(folder, "sys.exit(7)")
    assert supervisor.wait(20) == 7
    assert (folder / "up").exists()
    assert within(folder) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("import sys; sys.exit(75)", 75),
        ("import os; os.kill(os.getpid(), 9)", 128 + signal.SIGKILL),
        ("import sys; assert sys.stdin.read() == ''", 0),
    ],
)
def test_the_exit_code_is_the_commands(tmp_path: Path, code: str, expected: int) -> None:
    with Child([sys.executable, "-c", code], tmp_path / "log", os.environ) as child:
        assert child.wait(20) == expected


def test_a_command_that_does_not_exist_is_told_in_one_line(tmp_path: Path) -> None:
    with Child(["/nowhere/command"], tmp_path / "log", os.environ) as child:
        assert child.wait(20) == 127
    assert (tmp_path / "log").read_text() == "error: /nowhere/command: No such file or directory\n"


@pytest.mark.parametrize(("seconds", "left"), [(0.5, []), (20.0, ["left"])])
def test_what_is_told_to_end_is_killed_after_its_seconds_and_not_before(
    folder: Path, seconds: float, left: list[str]
) -> None:
    started = time.monotonic()
    command = [sys.executable, "-c", ENDS_SLOWLY]
    with contextlib.chdir(folder), Child(command, folder / "log", os.environ, seconds=seconds):
        while not (folder / "up").exists():
            time.sleep(0.02)
    assert time.monotonic() - started < 15
    assert [file.name for file in folder.glob("left")] == left


def test_an_exception_in_the_flow_ends_the_child(folder: Path) -> None:
    code = f"import os, time; os.chdir({str(folder)!r}); time.sleep(600)"

    def fail(child: Child) -> None:
        wait_for(1, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Child([sys.executable, "-c", code], folder / "log", os.environ) as child:
        fail(child)
    assert within(folder) == []


def test_a_kept_descriptor_stays_open_in_the_supervisor_and_is_not_the_commands(tmp_path: Path) -> None:
    read, write = os.pipe()
    code = f"import os, sys\ntry: os.fstat({write})\nexcept OSError: sys.exit(3)"
    with Child([sys.executable, "-c", code], tmp_path / "log", os.environ, kept=[write]) as child:
        os.close(write)
        assert child.wait(20) == 3
    # All writers are gone now, so the pipe is at its end instead of blocking.
    assert os.read(read, 1) == b""
    os.close(read)


def test_events_reach_the_flow_whole_and_in_order_and_noise_among_them_is_dropped(tmp_path: Path) -> None:
    code = """
        import os, time
        from tasks.progress import progress
        with open(os.environ["OVERNIGHT_EVENTS"], "a") as noise:
            noise.write("no event\\n")
        with progress("train") as shown:
            shown.begin("steps")
            for step in range(3):
                time.sleep(0.25)
                shown.update(step + 1, 3, "steps", loss=step / 2)
    """
    import textwrap

    events: list[Event] = []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    code = textwrap.dedent(code)
    assert process.run([sys.executable, "-c", code], tmp_path / "a.log", environment, events.append) == 0
    assert [(event.done, event.numbers["loss"]) for event in events] == [(1, 0.0), (2, 0.5), (3, 1.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["a.log"]


# Says that it is at work, and writes its checkpoint a second after it is told to end.
WRITES = """
import os, pathlib, signal, sys, time
def end(*_):
    time.sleep(1)
    pathlib.Path("left").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
with open(os.environ["OVERNIGHT_EVENTS"], "a") as events:
    events.write({event!r})
time.sleep(600)
"""


def heard(error: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs a training of which whoever hears raises ``error``; returns what was told until that was raised."""
    monkeypatch.setattr(process, "SECONDS_UNTOLD", 0.1)
    at_work = Event("train", "training", 1, 2, "steps", 1)
    told = []

    def hear(event: Event) -> None:
        told.append(event.notice)
        raise error

    command = [sys.executable, "-c", WRITES.format(event=f"{at_work.to_json()}\n")]
    with contextlib.chdir(folder), pytest.raises(error):
        process.run(command, folder / "train.log", os.environ, hear)
    return told


def test_a_second_interruption_does_not_wait_for_a_checkpoint_which_is_written_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = heard(KeyboardInterrupt, folder, monkeypatch)
    assert not (folder / "left").exists()
    assert told == ["", f"{process.TOLD_TO_END} Ctrl-C does not wait for that, and loses nothing."]
    until_gone(folder)
    assert (folder / "left").exists()


def test_a_checkpoint_is_waited_for_where_nobody_reads_any_more_that_it_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(heard(BrokenPipeError, folder, monkeypatch)) == 2
    assert (folder / "left").exists()
