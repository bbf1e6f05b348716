"""Checkpoints: whole or not there, proven by their digest, written beside the training that they must not disturb."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import flip_a_bit, steps

from tasks import atomic
from tasks.checkpoints import Checkpoints, Snapshot
from tasks.errors import DiskFull, TryAgain
from tasks.parallel import parts


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints("train", "inputs", kept=3, root=tmp_path)


def of_weight(step: int, weight: torch.Tensor) -> Snapshot:
    return Snapshot({"step": step}, tensors={"weight": weight})


def loaded(checkpoints: Checkpoints) -> tuple[int, torch.Tensor] | None:
    """The step of what is loaded, and its ``weight`` of four numbers."""
    state = checkpoints.load_latest()
    if state is None:
        return None
    weight = torch.empty(4)
    with checkpoints.confirmed(state):
        parts.read({"weight": weight}, state["parts"].folder)
    return state["step"], weight


def of_latest(checkpoints: Checkpoints) -> int | None:
    """The step of what is loaded."""
    state = checkpoints.load_latest()
    return None if state is None else state["step"]


def files(checkpoints: Checkpoints) -> list[Path]:
    return sorted(checkpoints.folder.glob("step-*.pt"), reverse=True)


def test_the_last_ones_are_kept_and_the_newest_intact_one_is_loaded(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.load_latest() is None
    for step in range(1, 7):
        checkpoints.save(step, of_weight(step, torch.full((4,), float(step))))
    checkpoints.finish()
    assert steps(checkpoints) == [4, 5, 6]
    assert sorted(path.name for path in checkpoints.folder.glob("parts-*")) == [f"parts-00000000{n}" for n in (4, 5, 6)]
    newest, before, _ = files(checkpoints)
    flip_a_bit(newest)
    before.write_bytes(before.read_bytes()[:-1])
    found = loaded(checkpoints)
    assert found is not None
    assert (found[0], found[1].tolist()) == (4, [4] * 4)
    told = capsys.readouterr().err.splitlines()
    assert told == [f"warning: {file}: damaged checkpoint; going back to the one before" for file in (newest, before)]
    part = checkpoints.folder / "parts-000000004/__0_0.distcp"
    flip_a_bit(part)
    assert checkpoints.load_latest() is None
    told = capsys.readouterr().err.splitlines()[-2:]
    assert told == [
        f"warning: {part}: damaged checkpoint; going back to the one before",
        f"warning: {checkpoints.folder}: there is none before; it begins anew",
    ]


def test_reading_one_is_told_block_by_block(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.digest._BLOCK", 2**12)
    checkpoints.save(1, of_weight(1, torch.arange(10_000)))
    checkpoints.finish()
    told: list[int] = []
    checkpoints.moved = lambda: told.append(1)
    assert checkpoints.load_latest() is not None
    assert len(told) >= 80_000 // 2**12


@pytest.mark.parametrize("change", ["damaged", "cut", "gone"])
def test_what_changes_between_its_check_and_its_use_is_told(checkpoints: Checkpoints, change: str) -> None:
    checkpoints.save(1, of_weight(1, torch.zeros(10_000)))
    checkpoints.finish()
    state = checkpoints.load_latest()
    assert state is not None
    file = state["parts"].folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    if change == "damaged":
        # In the midst of the weight: torch finds nothing wrong.
        content[len(content) // 2] = 1
        file.write_bytes(content)
    elif change == "cut":
        os.truncate(file, 20_000)
    else:
        file.unlink()
    weight = torch.ones(10_000)
    told = f"{file}: the checkpoint changed while it was read. Run again"
    with pytest.raises(TryAgain, match=told), checkpoints.confirmed(state):
        parts.read({"weight": weight}, state["parts"].folder)
    assert (change == "damaged") == (weight.count_nonzero() == 1)


def test_what_goes_wrong_in_reading_an_intact_one_is_no_change(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, of_weight(1, torch.zeros(4)))
    checkpoints.finish()
    state = checkpoints.load_latest()
    with pytest.raises(ZeroDivisionError), checkpoints.confirmed(state):
        raise ZeroDivisionError


def test_one_that_cannot_be_read_is_passed_over_as_a_damaged_one_is(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        checkpoints.save(step, Snapshot({"step": step}))
    checkpoints.finish()
    newest = files(checkpoints)[0]
    newest.unlink()
    newest.symlink_to(newest.name)
    assert of_latest(checkpoints) == 1
    told = f"warning: {newest}: cannot be read (Too many levels of symbolic links); going back to the one before\n"
    assert capsys.readouterr().err == told


def test_what_training_does_meanwhile_is_in_no_checkpoint(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), parts.write
    monkeypatch.setattr(parts, "write", lambda *arguments: may_write.wait(30) and write(*arguments))
    weight, losses, rows = torch.ones(4), torch.ones(2), [(1, 2.0)]
    # Returns although nothing can be written.
    checkpoints.save(1, Snapshot({"step": 1, "losses": losses, "rows": rows}, {"load": losses}, {"weight": weight}))
    weight.zero_()
    losses.zero_()
    rows.append((2, 1.0))
    may_write.set()
    checkpoints.finish()
    found = loaded(checkpoints)
    assert found is not None
    assert found[1].tolist() == [1] * 4
    state = checkpoints.load_latest()
    assert state is not None
    assert (state["losses"].tolist(), state["own"][0]["load"].tolist(), state["rows"]) == ([1] * 2, [1] * 2, [(1, 2.0)])


def test_those_of_another_number_of_processes_count_only_where_that_is_wanted(tmp_path: Path) -> None:
    two = Checkpoints("train", "inputs-2-1", kept=2, root=tmp_path)
    two.save(5, Snapshot({"step": 5}))
    two.finish()
    assert Checkpoints("train", "inputs-1-1", kept=2, root=tmp_path).load_latest() is None
    assert Checkpoints("train", "others-1-1", kept=2, elastic=True, root=tmp_path).load_latest() is None
    one = Checkpoints("train", "inputs-1-1", kept=2, elastic=True, root=tmp_path)
    assert of_latest(one) == 5
    one.save(7, Snapshot({"step": 7}))
    one.finish()
    assert of_latest(Checkpoints("train", "inputs-2-1", kept=2, elastic=True, root=tmp_path)) == 7
    assert of_latest(two) == 5


def test_those_of_another_number_of_processes_outlive_those_of_other_inputs(tmp_path: Path) -> None:
    keys = ["inputs-3-1", "others-2-1", "different-2-1", "older-2-1"]
    for age, key in enumerate(keys):
        run = Checkpoints("train", key, kept=2, root=tmp_path)
        run.save(5, Snapshot({"step": 5, "key of": key}))
        run.finish()
        os.utime(run.folder, (age, age))
    four = Checkpoints("train", "inputs-4-1", kept=2, elastic=True, root=tmp_path)
    four.forget_others()
    state = four.load_latest()
    assert state is not None
    assert state["key of"] == "inputs-3-1"
    assert {path.name for path in (tmp_path / "train").iterdir()} == {"inputs-3-1", "different-2-1", "older-2-1"}
    Checkpoints("train", "inputs-4-1", kept=2, root=tmp_path).forget_others()
    assert not (tmp_path / "train/inputs-3-1").exists()


def test_a_full_disk_is_told_by_the_next_checkpoint_or_the_end(
    checkpoints: Checkpoints, small_disk: Callable[[Path, int], None]
) -> None:
    checkpoints.folder.parent.mkdir()
    small_disk(checkpoints.folder, 300)
    # What torch meets in the midst of writing, and not at a file's end.
    checkpoints.save(1, of_weight(1, torch.zeros(2**20)))
    with pytest.raises(DiskFull, match=r"parts-000000001: the disk is full \([\d.]+ MiB free\)"):
        checkpoints.save(2, Snapshot({"step": 2}))
    checkpoints.save(3, Snapshot({"step": 3, "rows": torch.zeros(2**20)}))
    with pytest.raises(DiskFull, match=r"step-000000003-.*: the disk is full \([\d.]+ MiB free\)"):
        checkpoints.finish()
    assert not [*checkpoints.folder.iterdir()]


def test_what_a_killed_process_had_begun_is_gone_when_another_begins(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    checkpoints.save(1, Snapshot({"step": 1}))
    checkpoints.finish()
    # Nothing cleans up behind a process that is killed.
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    monkeypatch.setattr(os, "replace", killed)
    checkpoints.save(2, Snapshot({"step": 2}))
    with pytest.raises(Killed):
        checkpoints.finish()
    monkeypatch.undo()
    assert [*checkpoints.folder.glob(f"{atomic.PARTIAL}*")]
    checkpoints.forget_others()
    assert not [*checkpoints.folder.glob(f"{atomic.PARTIAL}*")]
    assert of_latest(checkpoints) == 1
    checkpoints.save(3, Snapshot({"step": 3}))
    checkpoints.finish()
    assert steps(checkpoints) == [1, 3]
    assert sorted(path.name for path in checkpoints.folder.glob("parts-*")) == ["parts-000000001", "parts-000000003"]


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
        checkpoints.save(step, Snapshot({"step": step}))
    checkpoints.finish()
    for file in files(checkpoints):
        flip_a_bit(file)
    assert checkpoints.load_latest() is None
    checkpoints.save(1, Snapshot({"step": 1}))
    checkpoints.finish()
    assert steps(checkpoints) == [1]
    assert of_latest(checkpoints) == 1
