"""Checkpoints: whole or not there, proven by their digest, written beside the training that they must not disturb."""

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import flip_a_bit, steps

from tasks import atomic
from tasks.checkpoints import Checkpoints
from tasks.errors import DiskFull, TryAgain
from tasks.parallel.whole import take_optimizer_state


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints("train", "inputs", kept=3, root=tmp_path)


def test_the_last_ones_are_kept_and_the_newest_intact_one_is_loaded(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.load_latest() is None
    for step in range(1, 6):
        checkpoints.save(step, {"step": step, "model": {"weight": torch.full((4,), step)}})
    checkpoints.finish()
    assert steps(checkpoints) == [3, 4, 5]
    newest, before = sorted(checkpoints.folder.iterdir(), reverse=True)[:2]
    flip_a_bit(newest)
    before.write_bytes(before.read_bytes()[:-1])
    state = checkpoints.load_latest()
    assert state is not None
    assert (state["step"], state["model"]["weight"].tolist()) == (3, [3] * 4)
    told = capsys.readouterr().err.splitlines()
    assert told == [f"warning: {file}: damaged checkpoint; going back to the one before" for file in (newest, before)]
    flip_a_bit(min(checkpoints.folder.iterdir()))
    assert checkpoints.load_latest() is None
    anew = f"warning: {checkpoints.folder}: there is none before; it begins anew"
    assert capsys.readouterr().err.splitlines()[-1] == anew


def test_reading_one_is_told_block_by_block(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.checkpoints._BLOCK", 2**12)
    checkpoints.save(1, {"step": 1, "model": torch.arange(10_000)})
    checkpoints.finish()
    told: list[int] = []
    checkpoints.moved = lambda: told.append(1)
    state = checkpoints.load_latest()
    assert state is not None
    assert torch.equal(state["model"], torch.arange(10_000))
    assert len(told) >= 80_000 // 2**12


def own_memory() -> int:
    """Of this process, in bytes, without pages of files."""
    (kilobytes,) = re.findall(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)


def test_processes_share_what_they_read(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.checkpoints._BLOCK", 2**20)
    checkpoints.save(1, {"step": 1, "model": torch.ones(2**24)})
    checkpoints.finish()
    before = own_memory()
    state = checkpoints.load_latest()
    assert state is not None
    assert state["model"].sum() == 2**24
    assert own_memory() - before < 2**24


def test_an_optimizer_keeps_nothing_of_the_file(checkpoints: Checkpoints) -> None:
    def stepped() -> torch.optim.Optimizer:
        weight = torch.nn.Parameter(torch.ones(1000))
        weight.grad = torch.ones(1000)
        optimizer = torch.optim.AdamW([weight])
        optimizer.step()
        return optimizer

    optimizer = stepped()
    checkpoints.save(1, {"step": 1, "optimizer": optimizer.state_dict()})
    checkpoints.finish()
    state, other = checkpoints.load_latest(), stepped()
    assert state is not None
    assert str(checkpoints.folder) in Path("/proc/self/maps").read_text()
    take_optimizer_state(other, state["optimizer"])
    del state
    assert str(checkpoints.folder) not in Path("/proc/self/maps").read_text()
    (found,), (expected,) = other.state.values(), optimizer.state.values()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("change", ["damaged", "replaced", "gone"])
def test_what_changes_between_its_check_and_its_use_is_told(
    checkpoints: Checkpoints, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(1, {"step": 1, "model": torch.arange(10_000)})
    checkpoints.finish()
    (file,) = checkpoints.folder.iterdir()
    load = torch.load

    def loaded(*arguments: object, **more: object) -> object:
        if change == "damaged":
            with file.open("r+b") as opened:
                opened.seek(file.stat().st_size // 2)
                opened.write(b"\xff")
        else:
            other = file.rename(file.with_suffix(".old"))
            if change == "replaced":
                torch.save({"step": 1, "key": "inputs", "model": torch.zeros(10_000)}, file)
            assert other.exists()
        return load(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "load", loaded)
    state = checkpoints.load_latest()
    assert state is not None
    # What is under the name by now is not read.
    assert change == "damaged" or torch.equal(state["model"], torch.arange(10_000))
    with pytest.raises(TryAgain, match=f"{file}: the checkpoint changed while it was read. Run again"):
        checkpoints.confirm()


def test_one_that_cannot_be_read_is_passed_over_as_a_damaged_one_is(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        checkpoints.save(step, {"step": step})
    checkpoints.finish()
    newest = max(checkpoints.folder.iterdir())
    newest.unlink()
    newest.symlink_to(newest.name)
    assert checkpoints.load_latest() == {"step": 1}
    told = f"warning: {newest}: cannot be read (Too many levels of symbolic links); going back to the one before\n"
    assert capsys.readouterr().err == told


def test_what_training_does_meanwhile_is_in_no_checkpoint(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, file = threading.Event(), atomic.file
    monkeypatch.setattr(atomic, "file", lambda *arguments: may_write.wait(30) and file(*arguments))
    weight, rows = torch.ones(4), [(1, 2.0)]
    # Returns although nothing can be written.
    checkpoints.save(1, {"step": 1, "weight": weight, "rows": rows})
    weight.zero_()
    rows.append((2, 1.0))
    may_write.set()
    checkpoints.finish()
    state = checkpoints.load_latest()
    assert state is not None
    assert (state["weight"].tolist(), state["rows"]) == ([1.0] * 4, [(1, 2.0)])


def test_those_of_another_number_of_processes_count_only_where_that_is_wanted(tmp_path: Path) -> None:
    two = Checkpoints("train", "inputs-2-1", kept=2, root=tmp_path)
    two.save(5, {"step": 5})
    two.finish()
    assert Checkpoints("train", "inputs-1-1", kept=2, root=tmp_path).load_latest() is None
    assert Checkpoints("train", "others-1-1", kept=2, elastic=True, root=tmp_path).load_latest() is None
    one = Checkpoints("train", "inputs-1-1", kept=2, elastic=True, root=tmp_path)
    assert one.load_latest() == {"step": 5}
    one.save(7, {"step": 7})
    one.finish()
    assert Checkpoints("train", "inputs-2-1", kept=2, elastic=True, root=tmp_path).load_latest() == {"step": 7}
    assert two.load_latest() == {"step": 5}


def test_those_of_another_number_of_processes_outlive_those_of_other_inputs(tmp_path: Path) -> None:
    keys = ["inputs-3-1", "others-2-1", "different-2-1", "older-2-1"]
    for age, key in enumerate(keys):
        run = Checkpoints("train", key, kept=2, root=tmp_path)
        run.save(5, {"step": 5, "key of": key})
        run.finish()
        os.utime(run.folder, (age, age))
    four = Checkpoints("train", "inputs-4-1", kept=2, elastic=True, root=tmp_path)
    four.forget_others()
    assert four.load_latest() == {"step": 5, "key of": "inputs-3-1"}
    assert {path.name for path in (tmp_path / "train").iterdir()} == {"inputs-3-1", "different-2-1", "older-2-1"}
    Checkpoints("train", "inputs-4-1", kept=2, root=tmp_path).forget_others()
    assert not (tmp_path / "train/inputs-3-1").exists()


def test_a_full_disk_is_told_by_the_next_checkpoint_or_the_end(
    checkpoints: Checkpoints, small_disk: Callable[[Path, int], None]
) -> None:
    checkpoints.folder.parent.mkdir()
    small_disk(checkpoints.folder, 300)
    # What torch meets in the midst of writing, and not at a file's end.
    large = {"model": torch.zeros(2**20)}
    checkpoints.save(1, {"step": 1, **large})
    with pytest.raises(DiskFull, match=r"step-000000001: the disk is full \(0\.3 MiB free\)"):
        checkpoints.save(2, {"step": 2})
    checkpoints.save(3, {"step": 3, **large})
    with pytest.raises(DiskFull, match="the disk is full"):
        checkpoints.finish()
    assert not [*checkpoints.folder.iterdir()]


def test_what_a_killed_process_had_begun_is_gone_when_another_begins(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    checkpoints.save(1, {"step": 1})
    checkpoints.finish()
    # Nothing cleans up behind a process that is killed.
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    monkeypatch.setattr(torch, "save", killed)
    checkpoints.save(2, {"step": 2})
    with pytest.raises(Killed):
        checkpoints.finish()
    monkeypatch.undo()
    assert len([*checkpoints.folder.iterdir()]) == 2
    checkpoints.forget_others()
    assert steps(checkpoints) == [1]


def test_a_full_disk_is_told_where_another_process_takes_the_folder_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "parts"
    place.mkdir()
    usage = shutil.disk_usage

    def of_what_is_left(folder: Path) -> object:
        if place.exists():
            place.rmdir()
        return usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", of_what_is_left)
    told = r"parts: the disk is full \([\d.,]+ MiB free\)"
    with pytest.raises(DiskFull, match=told), atomic.disk_full_is_told(place):
        raise OSError(errno.ENOSPC, "no space")


def test_what_is_written_after_all_were_damaged_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints("train", "inputs", kept=2, root=tmp_path)
    for step in (3, 4):
        checkpoints.save(step, {"step": step})
    checkpoints.finish()
    for file in checkpoints.folder.iterdir():
        flip_a_bit(file)
    assert checkpoints.load_latest() is None
    checkpoints.save(1, {"step": 1})
    checkpoints.finish()
    assert steps(checkpoints) == [1]
    assert checkpoints.load_latest() == {"step": 1}
