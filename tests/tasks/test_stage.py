"""The frame of every stage: which fault ends with which exit code, and in how many words."""

import errno
import gc

import pytest

from tasks import launch, stage
from tasks.errors import BadInput, Refused, TryAgain


def ends(capsys: pytest.CaptureFixture[str], error: Exception) -> tuple[object, str]:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        stage.run(fail)
    return caught.value.code, capsys.readouterr().err


def test_garbage_is_collected_again_when_the_imports_are_done() -> None:
    def collects() -> None:
        assert gc.isenabled()

    stage.begin()
    assert not gc.isenabled()
    stage.run(collects)
    with stage.importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()


@pytest.mark.parametrize(
    ("error", "code"), [(BadInput("no text"), 2), (TryAgain("no text"), 75), (Refused("no text"), 1)]
)
def test_a_fault_that_is_known_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception, code: int) -> None:
    assert ends(capsys, error) == (code, "error: no text\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EAGAIN, "Resource temporarily unavailable"),
        RuntimeError("[enforce fail at\npair.cc:84] connect. Resource temporarily unavailable"),
    ],
)
def test_a_machine_that_is_short_of_processes_or_sockets_is_worth_another_attempt(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    code, told = ends(capsys, error)
    assert code == 75
    assert told.startswith("error: the machine is short of processes or sockets: ")
    assert told.count("\n") == 1


def test_a_full_disk_that_a_library_meets_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = ends(capsys, OSError(errno.ENOSPC, "No space left on device", ".overnight/tensorboard/events"))
    assert code == 2
    assert told.startswith("error: .overnight/tensorboard/events: the disk is full (")
    assert told.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("shapes differ")])
def test_a_bug_stays_a_traceback(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        stage.run(fail)


@pytest.mark.parametrize(("codes", "expected"), [([1, 75, -15], 75), ([75, 2], 2)])
def test_the_launcher_ends_as_the_process_that_has_told_the_fault(codes: list[int], expected: int) -> None:
    with pytest.raises(SystemExit) as caught:
        launch.tell(dict(enumerate(codes)), False)
    assert caught.value.code == expected
