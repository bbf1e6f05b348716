"""What is no project, or none that can be worked in."""

from pathlib import Path

import pytest

from flows.project import NotAProject, find


def test_a_place_for_runs_that_is_not_mounted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    for name in (".git", ".dvc"):
        (tmp_path / name).mkdir()
    assert find() == tmp_path
    scratch = tmp_path / ".overnight"
    scratch.symlink_to("/mnt/not mounted")
    with pytest.raises(NotAProject, match=rf"^{scratch}: a link to /mnt/not mounted, which is not there\. Mount it: "):
        find()
    scratch.unlink()
    scratch.touch()
    with pytest.raises(NotAProject, match=rf"^{scratch}: a file\. Remove it: "):
        find()
