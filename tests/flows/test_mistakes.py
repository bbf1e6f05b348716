"""What a user can mend is one line and an exit code, in whatever words it came."""

import errno
import io
import marshal
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from flows import mistakes, ownership
from tasks.errors import TryAgain


@pytest.mark.parametrize("error", [RuntimeError("Server error '500'\nand more"), TryAgain("no answer.")], ids=repr)
def test_what_fails_on_a_disk_that_is_nearly_full_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with mistakes.mistakes_are_told():
            raise error

    with pytest.raises(type(error) if isinstance(error, RuntimeError) else typer.Exit):
        fail()
    capsys.readouterr()
    monkeypatch.setattr(mistakes, "_LEAST_FREE", 2**62)
    with pytest.raises(typer.Exit) as ended:
        fail()
    assert ended.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("error: Server error '500'. The disk is nearly full (", "error: no answer. The disk is "))
    assert line.endswith(" MiB free). Free some space and run again.")


@pytest.mark.parametrize("characters", [1, 20_000])
def test_what_cannot_be_printed_for_want_of_room_is_no_full_disk_of_the_project(
    characters: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        _told_of_stdout("a" * characters, capsys)


def test_what_a_file_cannot_take_for_want_of_room_is_no_full_disk_of_the_project(
    tmp_path: Path,
    small_disk: Callable[[Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = tmp_path / "disk"
    small_disk(disk, 4)
    (disk / "full").write_bytes(bytes(4096))
    with (disk / "texts").open("w") as texts:
        monkeypatch.setattr(sys, "stdout", texts)
        _told_of_stdout("a", capsys)
        (disk / "full").unlink()


def _told_of_stdout(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, mistakes.mistakes_are_told():
        print(text, flush=True)
    assert ended.value.exit_code == 2
    told = "error: stdout: there is no room where it goes (No space left on device). Send it elsewhere.\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("is_open", [True, False])
def test_where_stdout_has_room_or_is_closed_it_is_the_disk_that_is_full_and_nothing_is_printed_there(
    is_open: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "texts").open("w") as texts:
        monkeypatch.setattr(sys, "stdout", texts if is_open else None)
        with pytest.raises(typer.Exit) as ended, mistakes.mistakes_are_told():
            raise OSError(errno.ENOSPC, "No space left on device")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err.startswith(f"error: {Path.cwd()}: the disk is full (")
    assert (tmp_path / "texts").read_text() == ""


def test_what_somebody_else_owns_in_the_project_is_named_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> None:
        with mistakes.mistakes_are_told():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "project/.overnight/runs").mkdir(parents=True)
    (tmp_path / "theirs").touch()
    monkeypatch.chdir(tmp_path / "project")
    lock = tmp_path / "project/.overnight/runs/20261130.lock"
    # Our own, and what lies elsewhere.
    with pytest.raises(PermissionError):
        fail(lock)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(PermissionError):
        fail(tmp_path / "theirs")
    # Their folders let us in, as those of a team's project do: something else has refused.
    monkeypatch.setattr(os, "access", lambda place, mode: True)
    with pytest.raises(PermissionError):
        fail(lock)
    monkeypatch.setattr(os, "access", lambda place, mode: not mode & os.W_OK)
    # Python tells the number of what was asked for by its descriptor.
    with pytest.raises(PermissionError, match="denied: 7"), mistakes.mistakes_are_told():
        raise PermissionError(errno.EACCES, "Permission denied", 7)
    with pytest.raises(typer.Exit) as ended:
        fail(lock)
    assert ended.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    owner, advice = Path.cwd().owner(), ownership.advice(Path.cwd().stat().st_uid, Path.cwd())
    assert line == f"error: {lock}: no permission: {lock.parent} belongs to {owner}, and you are 54321{advice}"
    assert ownership.advice(0, Path.cwd()).endswith(f" sudo chown -R 54321 {Path.cwd()}")
    # To take it over would take it from the others who share the project.
    assert ownership.advice(12345, Path.cwd()) == ". Have 12345 let you at it."


@pytest.mark.parametrize(("refused", "closed"), [("texts/.gitignore", "texts"), ("a note.md", "a note.md")])
def test_what_our_own_modes_keep_us_from_is_named_with_the_command_that_lets_us_in(
    refused: str, closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "a note.md").touch()
    monkeypatch.chdir(tmp_path)
    # Root may do everything.
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path / closed)
    with pytest.raises(typer.Exit) as ended, mistakes.mistakes_are_told():
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / refused))
    assert ended.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    place = tmp_path / closed
    assert line == (
        f"error: {tmp_path / refused}: no permission: the mode of {place}, which is yours, keeps you out. "
        f"Let yourself in: chmod u+rwX {shlex.quote(str(place))}"
    )


def test_a_compiled_file_that_is_cut_off_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, mistakes.mistakes_are_told():
        marshal.loads(marshal.dumps("cut off")[:-1])
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err.startswith("error: a file that Python has compiled is cut off")


@pytest.mark.parametrize(
    ("goes_on", "line"),
    [(True, "interrupted; the same command goes on where this one stopped.\n"), (False, "interrupted.\n")],
    ids=["goes on", "does not"],
)
def test_an_interruption_names_a_way_on_only_where_there_is_one(
    goes_on: bool, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, mistakes.mistakes_are_told(goes_on):
        raise KeyboardInterrupt
    assert (ended.value.exit_code, capsys.readouterr().err) == (130, line)
