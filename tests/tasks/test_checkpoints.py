"""Checkpoints: whole or not there, proven by their digest, written beside the training that they must not disturb."""

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import forked
import pytest
import tiny
import torch

from tasks import atomic
from tasks.checkpoints import Checkpoints, agreed
from tasks.digest import digest_of
from tasks.errors import EXIT_TRY_AGAIN, DiskFull, TryAgain
from tasks.parallel.whole import take_optimizer_state


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints("train", "inputs", kept=3, root=tmp_path)


def steps(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name.split("-")[1]) for path in sorted(checkpoints.folder.iterdir())]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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


def newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(".overnight/checkpoints/train/*/*.pt"), reverse=True)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which two processes, each with a half of the model, have trained. Nobody changes it."""
    folder = tmp_path_factory.mktemp("cut")
    tiny.write_params(folder, train__mesh__shard=2)
    tiny.write_shards(folder)
    assert tiny.run("train", folder)[0] == 0
    return folder


@pytest.fixture
def project(cut: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "project"))


def parts(folder: Path) -> dict[str, list[str]]:
    """The files in each folder of parts."""
    found = folder.glob(".overnight/checkpoints/train/*/parts-*")
    return {path.name: sorted(file.name for file in path.iterdir()) for path in found}


def test_each_process_writes_its_part_which_goes_with_its_checkpoint(cut: Path) -> None:
    files = [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert parts(cut) == {"parts-000000010": files, "parts-000000012": files}
    newest, _ = newest_first(cut)
    state = torch.load(newest, weights_only=True)
    # What is written by one alone holds nothing that grows with the model but the routers' biases.
    assert not [name for name in state["model"] if "e_score_correction_bias" not in name]
    sizes = [(newest.parent / "parts-000000012" / name).stat().st_size for name in files[1:]]
    assert max(sizes) < 1.3 * min(sizes)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_part_is_told_and_the_checkpoint_before_is_used(
    project: Path, name: str, gone: bool, cut: Path
) -> None:
    shutil.rmtree(project / "models")
    file = newest_first(project)[0].parent / "parts-000000012" / name
    file.unlink() if gone else flip_a_bit(file)
    # Of an attempt that was killed while it wrote.
    shutil.copytree(file.parent, file.parent.with_name("parts-000000011"))
    code, output = tiny.run("train", project)
    assert code == 0, output
    told = f"parts-000000012/{name}: damaged checkpoint; going back to the one before"
    assert output.count("damaged checkpoint") == output.count(told) == 1, output
    assert "Warning" not in output
    assert tiny.files_of(project / "models") == tiny.files_of(cut / "models")
    assert sorted(parts(project)) == ["parts-000000010", "parts-000000012"]


def test_a_part_that_cannot_be_read_is_told_and_the_checkpoint_before_is_used(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = newest_first(project)[0].parent
    bad = folder / "parts-000000012/__1_0.distcp"

    def digest(file: Path) -> str:
        if file == bad:
            raise OSError(errno.EIO, "Input/output error")
        return digest_of(file)

    monkeypatch.setattr("tasks.parallel.parts.digest_of", digest)
    state = Checkpoints("train", folder.name, kept=2, root=folder.parent.parent).load_latest()
    assert state is not None
    assert state["step"] == 10
    told = f"warning: {bad}: cannot be read (Input/output error); going back to the one before\n"
    assert capsys.readouterr().err == told


def test_a_disk_that_is_full_of_parts_is_one_line(
    project: Path, cut: Path, small_disk: Callable[[Path, int], None]
) -> None:
    shutil.rmtree(project / "models")
    place = project / ".overnight/checkpoints"
    shutil.rmtree(place)
    small_disk(place, 300)
    code, output = tiny.run("train", project)
    assert code == 2
    assert not parts(project)
    assert re.fullmatch(
        r".*/parts-000000002: the disk is full .* Free some space and run again\.", tiny.error_line(output)
    )


def test_what_another_mesh_has_written_is_taken_over(project: Path) -> None:
    shutil.rmtree(project / "models")
    newest_first(project)[0].unlink()
    for changes in ({"train__mesh__shard": 1, "train__mesh__pipeline": 2}, {"train__world_size": 1}):
        tiny.write_params(project, train__elastic=True, **changes)
        events = project / "events"
        code, output = tiny.run("train", project, OVERNIGHT_EVENTS=str(events))
        assert code == 0, output
        assert tiny.first_step(events)["done"] == 11
        events.unlink()
        shutil.rmtree(project / "models")
        # The last step again, from what the first mesh has left.
        for file in project.glob(".overnight/checkpoints/train/*/*-000000012-*.pt"):
            file.unlink()


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


def each_agrees(folder: Path, leave: Callable[[int, Checkpoints], None], part: int = 0) -> list[object]:
    """Returns what two machines agree on that have disks of their own, in which ``leave`` leaves checkpoints."""
    told, barrier = [0, 0], threading.Barrier(2)

    def agree(number: int) -> object:
        own = Checkpoints("train", "inputs", kept=3, root=folder / str(number))
        leave(number, own)
        own.finish()
        return agreed(own, Half(number, told, barrier), part)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(agree, range(2)))


def test_processes_that_find_other_states_of_one_step_go_on_from_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(number: int, own: Checkpoints) -> None:
        own.save(4, {"step": 4})
        own.save(5, {"step": 5, "weight": number})

    assert each_agrees(tmp_path, leave) == [{"step": 4}, {"step": 4}]
    told = f"warning: {tmp_path}/0/train/inputs: not all processes have the checkpoint of step 5; all go on from step 4"
    assert capsys.readouterr().err.splitlines() == [told]


def test_a_machine_without_any_checkpoint_does_not_have_the_others_begin_anew(tmp_path: Path) -> None:
    def leave(number: int, own: Checkpoints) -> None:
        if not number:
            own.save(40, {"step": 40})
            own.save(80, {"step": 80})

    with pytest.raises(TryAgain, match="inputs: rank 1 found no checkpoint there, and another process that of step 80"):
        each_agrees(tmp_path, leave)
    assert steps(Checkpoints("train", "inputs", kept=3, root=tmp_path / "0")) == [40, 80]


def test_where_the_first_checkpoint_was_cut_off_between_its_parts_all_begin_anew(tmp_path: Path) -> None:
    def leave(number: int, own: Checkpoints) -> None:
        own.save(40, {"step": 40})
        if not number:
            own.save(40, {"step": 40}, part=1)

    assert each_agrees(tmp_path, leave, part=1) == [None, None]


def test_a_training_takes_no_step_from_what_changed_while_it_was_read(project: Path) -> None:
    newest_first(project)[0].unlink()
    shutil.rmtree(project / "models")
    code, output = tiny.run("train", project, forked.damage_what_is_loaded)
    assert code == EXIT_TRY_AGAIN, output
    assert "the checkpoint changed while it was read. Run again to go on from what is intact." in output
    assert not (project / "models").exists()


def test_where_a_machine_has_damaged_all_of_its_own_all_begin_anew_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(number: int, own: Checkpoints) -> None:
        own.save(40, {"step": 40})
        own.finish()
        if number:
            flip_a_bit(*own.folder.iterdir())

    assert each_agrees(tmp_path, leave) == [None, None]
    told = capsys.readouterr().err
    assert "there is none before; it begins anew" in told
    assert "not all processes have the checkpoint of step 40; all begin anew" in told
