"""Processes whose disks differ agree on the checkpoint that all go on from."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import forked
import pytest
import tiny
from checkpoint_files import flip_a_bit, newest_first, steps

from tasks.checkpoints import Checkpoints, Snapshot, agreed
from tasks.errors import TryAgain


def test_processes_whose_disks_differ_go_on_from_the_newest_state_that_all_have(tmp_path: Path) -> None:
    first, second, log = tmp_path / "first", tmp_path / "second", tmp_path / "log"
    first.mkdir()
    tiny.write_params(first, train__keep_checkpoints=3)
    tiny.write_shards(first)
    assert forked.end(forked.start([first, first], log)) == [0, 0], log.read_text()
    expected = tiny.files_of(first / "models")
    assert [int(path.name[5:14]) for path in newest_first(first)] == [12, 10, 8]
    shutil.copytree(first, second)
    # They have 10 and 12 as their newest, and both 8. Had each begun at its own, one would wait for the other for ever.
    flip_a_bit(newest_first(first)[0])
    flip_a_bit(newest_first(second)[1])
    shutil.rmtree(first / "models")
    assert forked.end(forked.start([first, second], log)) == [0, 0], log.read_text()
    assert tiny.files_of(first / "models") == expected


class Half:
    """One of two processes, as threads."""

    def __init__(self, number: int, told: list[int], barrier: threading.Barrier) -> None:
        self._number, self._told, self._barrier = number, told, barrier
        self.is_first = not number

    def of_all(self, value: int) -> list[int]:
        self._told[self._number] = value
        self._barrier.wait(30)
        found = list(self._told)
        self._barrier.wait(30)
        return found

    def lowest(self, value: int) -> int:
        return min(self.of_all(value))

    def fail(self, error: TryAgain) -> NoReturn:
        raise error


def each_agrees(folder: Path, leave: Callable[[int, Checkpoints], None]) -> list[object]:
    """Returns the steps that two machines go on from, on whose own disks ``leave`` leaves checkpoints."""
    told, barrier = [0, 0], threading.Barrier(2)

    def agree(number: int) -> object:
        own = Checkpoints("train", "inputs", kept=3, root=folder / str(number))
        leave(number, own)
        own.finish()
        state = agreed(own, Half(number, told, barrier))  # type: ignore[arg-type]
        return None if state is None else state["step"]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(agree, range(2)))


def test_processes_that_find_other_states_of_one_step_go_on_from_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = Checkpoints("train", "inputs", kept=3, root=tmp_path / "both")
    both.save(4, Snapshot({"step": 4}))
    both.finish()

    def leave(number: int, own: Checkpoints) -> None:
        shutil.copytree(both.folder, own.folder)
        own.save(5, Snapshot({"step": 5, "weight": number}))

    assert each_agrees(tmp_path, leave) == [4, 4]
    told = f"warning: {tmp_path}/0/train/inputs: not all processes have the checkpoint of step 5; all go on from step 4"
    assert capsys.readouterr().err.splitlines() == [told]


def test_a_machine_without_any_checkpoint_does_not_have_the_others_begin_anew(tmp_path: Path) -> None:
    def leave(number: int, own: Checkpoints) -> None:
        if not number:
            own.save(40, Snapshot({"step": 40}))
            own.save(80, Snapshot({"step": 80}))

    with pytest.raises(TryAgain, match="inputs: rank 1 found no checkpoint there, and another process that of step 80"):
        each_agrees(tmp_path, leave)
    assert steps(Checkpoints("train", "inputs", kept=3, root=tmp_path / "0")) == [40, 80]


def test_where_a_machine_has_damaged_all_of_its_own_all_begin_anew_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(number: int, own: Checkpoints) -> None:
        own.save(40, Snapshot({"step": 40}))
        own.finish()
        if number:
            flip_a_bit(*own.folder.glob("step-*.pt"))

    assert each_agrees(tmp_path, leave) == [None, None]
    told = capsys.readouterr().err
    assert "there is none before; it begins anew" in told
    assert "not all processes have the checkpoint of step 40; all begin anew" in told
