"""A forked DVC command is what a started one is: its output, its exit code, and nothing left behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import ENDS_SLOWLY, alive
from waiting import until

from flows import dvc_fork, dvc_lock, supervise
from flows.dvc_fork import PREFIX, DvcChild


@pytest.fixture(autouse=True)
def _nothing_shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a forking process of its own."""
    monkeypatch.setattr(dvc_fork, "_commands", None)
    yield
    if dvc_fork._commands is not None:
        dvc_fork._commands.close()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC repository with a stage that says who and where it is, then sleeps."""
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, "init", "--no-scm", "--quiet") == 0
    (tmp_path / "dvc.yaml").write_text("stages:\n  one:\n    cmd: echo $WHO in $PWD; sleep $NAP\n")
    return tmp_path


def run(folder: Path, *arguments: str, kept: tuple[int, ...] = (), **more: str) -> int:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "SHELL": "/bin/sh", "NAP": "0", **more}
    with DvcChild([*PREFIX, *arguments], folder / "log", environment, kept=kept) as child:
        code = child.wait(60)
    assert code is not None
    return code


def forker() -> psutil.Process:
    """The process of this test; others in the same interpreter may have left theirs."""
    left = filter(alive, psutil.Process().children())
    (found,) = [one for one in left if "dvc_fork.serve" in " ".join(one.cmdline()) and Path(one.cwd()) == Path.cwd()]
    return found


def test_commands_are_forks_of_one_process_with_their_own_surroundings(project: Path) -> None:
    first = forker()
    assert run(project, "repro", WHO="somebody") == 0
    assert f"somebody in {project}\n" in (project / "log").read_text()
    assert run(project, "no-such-command") == 254
    assert run(project, "repro", "--force", WHO="another") == 0
    assert f"another in {project}\n" in (project / "log").read_text()
    assert forker() == first
    assert psutil.wait_procs(first.children(), 5)[1] == []


def test_a_command_finds_imported_what_it_needs(project: Path) -> None:
    code = (
        "import sys\nfrom flows import dvc_fork\ndvc_fork._import()\nimported = set(sys.modules)\nimport dvc.cli\n"
        "dvc.cli.main(['repro'])\nprint('NEW', *sorted(set(sys.modules) - imported))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env={**os.environ, "DVC_NO_ANALYTICS": "1", "SHELL": "/bin/sh"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.rpartition("NEW")[2].split() == [], done.stdout


def test_it_ends_with_the_flow(project: Path) -> None:
    one = forker()
    assert dvc_fork._commands is not None
    dvc_fork._commands.close()
    one.wait(10)


def test_a_killed_forker_is_replaced(project: Path) -> None:
    first = forker()
    first.kill()
    first.wait(10)
    assert run(project, "status") == 0
    assert forker() != first


def test_a_stage_ends_with_the_block_and_a_killed_command_says_so(project: Path) -> None:
    environment = {**os.environ, "NAP": "600", "SHELL": "/bin/sh"}

    def sleeping(parent: psutil.Process) -> list[psutil.Process]:
        return [one for one in parent.children(recursive=True) if one.name() == "sleep"]

    def wait() -> psutil.Process:
        return until(lambda: sleeping(forker()), 30, (project / "log").read_text)[0]

    with DvcChild([*PREFIX, "repro"], project / "log", environment) as child:
        sleeper = wait()
        assert child.wait(0) is None
    assert child.wait(0) == supervise.STOPPED
    assert not sleeper.is_running()
    # A command that ends in the middle of a write leaves half of DVC's notes; a run mends them before its next one.
    dvc_lock.mend(project)

    with DvcChild([*PREFIX, "repro"], project / "log", environment) as child:
        wait()
        (supervisor,) = forker().children()
        supervisor.children()[0].kill()
        assert child.wait(10) == 128 + 9
    assert psutil.wait_procs(forker().children(), 5)[1] == []


def test_a_stage_has_its_seconds_to_end(project: Path) -> None:
    (project / "slow.py").write_text(ENDS_SLOWLY)
    (project / "dvc.yaml").write_text(f"stages:\n  one:\n    cmd: {sys.executable} slow.py\n")
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "SHELL": "/bin/sh"}
    with DvcChild([*PREFIX, "repro"], project / "log", environment, seconds=30.0):
        until((project / "up").exists)
    assert (project / "left").exists()


def test_its_notes_are_those_of_a_living_command_to_whoever_mends_them(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages:\n  one:\n    cmd: sleep 2; echo 1 > made\n    outs: [made]\n")
    table = project / ".dvc/tmp/rwlock"
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "SHELL": "/bin/sh"}
    with DvcChild([*PREFIX, "repro"], project / "log", environment) as child:
        until(lambda: table.exists() and b"made" in table.read_bytes())
        # As `overnight versions` does, and whatever else looks at the project meanwhile.
        dvc_lock.mend(project)
        assert table.exists()
        # Until the table is whole, the lock of the repository tells of it, which knows no command.
        until(lambda: (holder := dvc_lock.other(project)) and holder.command.endswith("dvc repro"))
        assert child.wait(60) == 0


def test_a_kept_descriptor_stays_open_in_the_supervisor_alone(project: Path) -> None:
    read, write = os.pipe()
    (project / "dvc.yaml").write_text(
        f"stages:\n  one:\n    cmd: {sys.executable} -c 'import os; print(len(os.listdir(\"/proc/self/fd\")))'\n"
    )
    with DvcChild([*PREFIX, "repro"], project / "log", {**os.environ, "SHELL": "/bin/sh"}, kept=[write]) as child:
        os.close(write)
        assert child.wait(60) == 0
    # Its three, and the listing itself.
    assert "\n4\n" in (project / "log").read_text()
    assert os.read(read, 1) == b""
    os.close(read)
