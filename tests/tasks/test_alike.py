"""Machines that would not train the same thing are told so before they begin."""

import shutil
from datetime import timedelta
from pathlib import Path

import disturb
import forked
import pytest
import tiny

from tasks.errors import EXIT_USER_MISTAKE


def train_on_two(folder: Path, others: dict[str, object], **changes: object) -> tuple[list[int | None], list[str]]:
    """Trains in a folder a machine, of which the second has ``others`` as well; returns exit codes and errors."""
    for name, own in (("first", changes), ("second", {**changes, **others})):
        (folder / name).mkdir()
        tiny.write_params(folder / name, train__world_size=2, **own)
        tiny.write_shards(folder / name)
    log = folder / "log"
    codes = forked.end(forked.start([folder / "first", folder / "second"], log, disturb.only_the_first_has_bf16))
    return codes, [line for line in log.read_text().splitlines() if line.startswith("error")]


@pytest.mark.parametrize("mesh", [{}, {"train__mesh__shard": 2}])
def test_other_parameters_on_one_machine_are_told(mesh: dict[str, object], tmp_path: Path) -> None:
    codes, errors = train_on_two(tmp_path, {"train__learning_rate": 0.03}, train__precision="fp32", **mesh)
    assert codes == [EXIT_USER_MISTAKE] * 2
    (error,) = errors
    assert error.startswith("error: train: rank 1 and rank 0 do not have the same inputs: the section train of params")


def test_another_mesh_on_one_machine_is_told_before_any_group_of_it_is_made(tmp_path: Path) -> None:
    codes, errors = train_on_two(tmp_path, {"train__mesh__shard": 2}, train__precision="fp32")
    assert codes == [EXIT_USER_MISTAKE] * 2
    told = "the mesh of rank 1 is not that of rank 0; all machines need the same params.yaml"
    assert errors == [f"error: params.yaml: {told}."]


def test_folders_of_their_own_with_the_same_content_are_no_matter(tmp_path: Path) -> None:
    assert train_on_two(tmp_path, {}, train__precision="fp32") == ([0, 0], [])


def test_processors_that_auto_takes_apart_are_told(tmp_path: Path) -> None:
    codes, errors = train_on_two(tmp_path, {}, train__precision="auto")
    assert codes == [EXIT_USER_MISTAKE] * 2
    assert errors == [
        "error: params.yaml: precision is bf16 on rank 0, fp32 on rank 1: where it is auto, their processors are not "
        "alike. Set it to the one in which all are to compute."
    ]


def test_another_processor_that_goes_on_in_another_precision_says_so(tmp_path: Path) -> None:
    tiny.write_params(tmp_path, **tiny.ALONE, train__precision="auto")
    tiny.write_shards(tmp_path)
    said = []
    for prepare in (disturb.only_the_first_has_bf16, disturb.lack_bf16):
        code, output = tiny.run("train", tmp_path, prepare)
        assert code == 0, output
        said.append(output)
        shutil.rmtree(tmp_path / "models")
        # The last steps again.
        for file in sorted(tmp_path.glob(".overnight/checkpoints/train/*/step-*"))[1:]:
            file.unlink()
    assert ["precision auto is fp32 here, and was bf16: a rebuild will differ" in one for one in said] == [False, True]


@pytest.mark.parametrize("check", [disturb.check_patience, disturb.check_patience_of_replicas])
def test_every_group_has_the_timeout_that_was_asked_for(check: object, tmp_path: Path) -> None:
    assert timedelta(hours=2) == disturb.PATIENCE
    forked.together(check, 2, tmp_path)  # type: ignore[arg-type]
