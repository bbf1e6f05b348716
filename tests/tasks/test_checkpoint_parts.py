"""A checkpoint of which each process writes its part: the parts are proven, kept and gone with it."""

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import disturb
import pytest
import tiny
import torch
from checkpoint_files import flip_a_bit, newest_first

from lm import hugging_face
from tasks.checkpoints import Checkpoints
from tasks.digest import digest_of
from tasks.errors import EXIT_TRY_AGAIN


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which two processes, each with a half of the model, have trained. Nobody changes it."""
    folder = tmp_path_factory.mktemp("cut")
    tiny.write_params(folder, train__mesh__shard=2)
    tiny.write_shards(folder)
    code, output = tiny.run("train", folder)
    assert code == 0, output
    (folder / "output").write_text(output)
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


def test_the_axis_along_which_the_model_is_cut_is_measured_and_told(cut: Path) -> None:
    output = (cut / "output").read_text()
    assert "train     shard x2: all-reduce " in output
    assert "replicate x" not in output
    assert hugging_face.load(cut / "models/float").parameter_counts()[0] > 0


@pytest.mark.parametrize(("name", "gone"), [(".metadata", False), ("__1_0.distcp", True)])
def test_a_damaged_part_is_told_once_and_the_checkpoint_before_is_used(
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


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("gone", [False, True])
def test_whichever_part_is_damaged_is_told(
    project: Path, name: str, gone: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = newest_first(project)[0].parent
    bad = folder / "parts-000000012" / name
    bad.unlink() if gone else flip_a_bit(bad)
    assert step_of_latest(folder) == 10
    assert capsys.readouterr().err == f"warning: {bad}: damaged checkpoint; going back to the one before\n"


def step_of_latest(folder: Path) -> int | None:
    """The step after which the training whose checkpoints are in ``folder`` goes on."""
    state = Checkpoints("train", folder.name, kept=2, root=folder.parent.parent).load_latest()
    return None if state is None else state["step"]


def test_a_part_that_cannot_be_read_is_told_and_the_checkpoint_before_is_used(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = newest_first(project)[0].parent
    bad = folder / "parts-000000012/__1_0.distcp"

    def digest(file: Path, moved: Callable[[], None]) -> str:
        if file == bad:
            raise OSError(errno.EIO, "Input/output error")
        return digest_of(file, moved)

    monkeypatch.setattr("tasks.parallel.parts.digest_of", digest)
    assert step_of_latest(folder) == 10
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


@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_a_training_takes_no_step_from_what_changed_while_it_was_read(project: Path, damage: str) -> None:
    newest_first(project)[0].unlink()
    shutil.rmtree(project / "models")
    code, output = tiny.run("train", project, disturb.damage_what_is_loaded, DAMAGE=damage)
    assert code == EXIT_TRY_AGAIN, output
    assert "the checkpoint changed while it was read. Run again to go on from what is intact." in output
    assert not (project / "models").exists()
