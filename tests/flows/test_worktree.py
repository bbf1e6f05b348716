"""A worktree holds one commit, shares DVC's cache and remotes, and knows nothing of what is uncommitted."""

import subprocess
from pathlib import Path

import pytest

from flows import worktree
from flows.git import GitFailed, commit_of, git


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc/config").write_text("[core]\n    remote = shelf\n['remote \"shelf\"']\n    url = ../../shelf\n")
    (root / ".dvc/config.local").write_text("['remote \"shelf\"']\n    verify = true\n")
    (root / ".gitignore").write_text(".overnight\n.dvc/config.local\n")
    (root / "params.yaml").write_text("steps: 1\n")
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, check=True)
    git(root, "add", ".")
    git(root, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "The project")
    return root


def test_edits_in_the_project_do_not_reach_it(project: Path) -> None:
    commit = commit_of(project, "HEAD")
    (project / "params.yaml").write_text("steps: 2\n")
    (project / "new.txt").write_text("new")
    place = worktree.add(project, "night", commit)
    assert (place / "params.yaml").read_text() == "steps: 1\n"
    assert not (place / "new.txt").exists()
    assert git(place, "rev-parse", "HEAD") == commit
    assert worktree.main(place) == worktree.main(project) == project


def test_it_holds_the_bytes_of_the_commit_whatever_line_ends_the_user_likes(project: Path) -> None:
    git(project, "config", "core.autocrlf", "true")
    place = worktree.add(project, "night", "HEAD")
    assert (place / "params.yaml").read_bytes() == b"steps: 1\n"
    assert git(place, "status", "--porcelain") == ""


def test_cache_and_remotes_are_the_project_s(project: Path) -> None:
    from dvc.config import Config

    place = worktree.add(project, "night", "HEAD")
    config = Config(str(place / ".dvc"))
    assert config["cache"]["dir"] == str(project / ".dvc/cache")
    assert config["remote"]["shelf"]["url"] == str(project.parent / "shelf")
    assert config["remote"]["shelf"]["verify"] is True
    assert git(place, "status", "--porcelain") == ""


def test_half_done_work_is_found_again(project: Path) -> None:
    place = worktree.add(project, "night", "HEAD")
    (place / "half").write_text("done")
    assert (worktree.add(project, "night", "HEAD") / "half").read_text() == "done"
    assert list(worktree.names(project)) == ["night"]


def test_a_lock_that_a_dead_git_command_left_is_removed_from_a_worktree_and_named_elsewhere(project: Path) -> None:
    place = worktree.add(project, "night", "HEAD")
    for lock in (project / ".git/worktrees/night/index.lock", project / ".git/index.lock"):
        lock.touch()
    worktree.add(project, "night", "HEAD")
    git(place, "reset", "--quiet", "--hard")
    # Anybody may be at work in the project itself.
    with pytest.raises(GitFailed, match=r"/\.git/index\.lock': File exists\. .*: if none is, remove that file\."):
        git(project, "add", ".")


def test_a_half_made_worktree_is_made_anew(project: Path) -> None:
    place = worktree.add(project, "night", "HEAD")
    (place / "params.yaml").unlink()
    (place.parent / ".night.ready").unlink()
    assert (worktree.add(project, "night", "HEAD") / "params.yaml").exists()


def test_a_project_that_is_mounted_elsewhere_keeps_the_half_done_work_of_its_worktrees(project: Path) -> None:
    for name in ("night", "another"):
        (worktree.add(project, name, "HEAD") / "half").write_text("done")
    # As a container sees it that has nothing but the project, at another path. Somebody prunes there.
    inside = project.rename(project.with_name("inside"))
    git(inside, "worktree", "prune", "--expire=now")
    feature = project.parent / "feature"
    git(inside, "worktree", "add", "-q", str(feature))
    feature.rename(feature.with_name("unseen"))
    assert (worktree.add(inside, "night", "HEAD") / "half").exists()
    worktree.remove(inside, "night")
    worktree.add(inside, "third", "HEAD")
    # Those that cannot be seen are still known: ours, and a person's own.
    assert {place.name for place in (inside / ".git/worktrees").iterdir()} == {"another", "third", "feature"}
    inside.rename(project)
    assert (worktree.add(project, "another", "HEAD") / "half").exists()


def test_a_removed_worktree_leaves_nothing(project: Path) -> None:
    place = worktree.add(project, "night", "HEAD")
    (place / "half").write_text("done")
    worktree.remove(project, "night")
    worktree.remove(project, "night")
    assert not place.exists()
    assert git(project, "worktree", "list").count("\n") == 0


def test_a_project_below_the_root_of_its_repository(project: Path) -> None:
    inner = project / "inner"
    (inner / ".dvc").mkdir(parents=True)
    (inner / ".dvc/config").write_text("")
    git(project, "add", ".")
    git(project, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "A project inside")
    place = worktree.add(inner, "night", "HEAD")
    assert place == inner / worktree.FOLDER / "night/inner"
    assert worktree.main(place) == inner


def test_an_unknown_commit_is_named(project: Path) -> None:
    with pytest.raises(GitFailed, match="nowhere"):
        worktree.add(project, "night", "nowhere")


def test_a_project_that_is_seen_under_another_path_keeps_its_half_done_work(project: Path) -> None:
    place = worktree.add(project, "night", "HEAD")
    (place / "half").write_text("done")
    # As a container sees it, and what may be typed there.
    moved = project.rename(project.with_name("elsewhere"))
    git(moved, "worktree", "prune", "--expire=now")
    again = worktree.add(moved, "night", "HEAD")
    assert again == moved / worktree.FOLDER / "night"
    assert (again / "half").read_text() == "done"
    assert git(again, "status", "--short") == "?? half"


def test_somebodys_own_worktree_that_cannot_be_seen_is_not_forgotten(project: Path, tmp_path: Path) -> None:
    own = tmp_path / "feature"
    git(project, "worktree", "add", "--quiet", str(own))
    own.rename(tmp_path / "unmounted")
    worktree.add(project, "night", "HEAD")
    worktree.remove(project, "night")
    (tmp_path / "unmounted").rename(own)
    assert git(own, "rev-parse", "--abbrev-ref", "HEAD") == "feature"
