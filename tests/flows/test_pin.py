"""A night starts from what people committed and from the last night's pointers."""

import hashlib
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from flows import contents, dvc, land, pin, raw, worktree
from flows.git import commit_of, git
from tasks.errors import TryAgain
from tasks.publish_params import PublishParams

PUBLISH = PublishParams()


def commit(root: Path, files: dict[str, str], message: str = "A change") -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    git(root, "add", ".")
    git(root, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", message)
    return commit_of(root, "HEAD")


def text(project: Path, *names: str) -> str:
    """A pointer to a folder of text with these files, of which the cache has the list."""
    files = {PurePosixPath(name): hashlib.md5(name.encode()).hexdigest() for name in names}
    md5 = contents.listing_md5(files)
    with dvc.store(project) as store:
        store.path(md5).parent.mkdir(parents=True, exist_ok=True)
        store.path(md5).write_bytes(contents.listing(files))
    return f"outs:\n- md5: {md5}\n  hash: md5\n  path: raw\n"


def names(root: Path) -> str:
    """The files of the text that the worktree's pointer names."""
    (one,) = (one for one in contents.present(root) if one.path == Path("data/raw"))
    with dvc.store(root) as store:
        return "".join(map(str, contents.parse_listing(store.path(one.md5).read_bytes())))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, check=True)
    files = {".dvc/config": "", ".gitignore": ".overnight\n.dvc/config.local\n", "params.yaml": "steps: 1\nseed: 1\n"}
    commit(root, {**files, "extra.dvc": "outs: []\n"})
    commit(root, {"dvc.lock": "stages: {}", "data/raw.dvc": text(root, "a", "b")})
    return root


@pytest.fixture
def night(project: Path) -> str:
    """The commit of a night, on its branch, which nobody has checked out."""
    place = worktree.add(project, "last", "HEAD")
    written = dict.fromkeys(("environment.json", "speed/train.csv"), "night")
    made = commit(place, {"dvc.lock": "stages:", "data/raw.dvc": text(project, "a", "b", "n"), **written})
    git(project, "update-ref", "refs/heads/nightly", made)
    return made


def test_the_first_night_starts_from_what_is_committed(project: Path) -> None:
    (project / "params.yaml").write_text("steps: 99\n")
    root = pin.worktree_of(project, "a", PUBLISH)
    assert git(root, "rev-parse", "HEAD") == commit_of(project, "main")


def test_without_news_from_people_it_starts_from_the_last_night(project: Path, night: str) -> None:
    assert git(pin.worktree_of(project, "a", PUBLISH), "rev-parse", "HEAD") == night


def test_what_people_lay_beside_the_measured_speeds_is_theirs() -> None:
    names = ("speed/train.csv", "speed/README.md", "speed/more/train.csv", "other/train.csv")
    assert [land.is_written(name) for name in names] == [True, False, False, False]


def test_what_people_committed_comes_in_and_the_pointers_stay(project: Path, night: str) -> None:
    by_hand = {"dvc.lock": "stages: {first: {}}", "speed/train.csv": "by hand"}
    base = commit(project, {"params.yaml": "steps: 2\nseed: 1\n", **by_hand})
    root = pin.worktree_of(project, "a", PUBLISH)
    assert (root / "params.yaml").read_text() == "steps: 2\nseed: 1\n"
    written = [(root / name).read_text() for name in ("dvc.lock", "environment.json", "speed/train.csv")]
    assert written == ["stages:", "night", "night"]
    assert names(root) == "abn"
    assert git(root, "rev-list", "--parents", "-1", "HEAD").split()[1:] == [night, base]
    assert git(root, "status", "--porcelain") == ""


def test_what_people_ignore_and_version_comes_in(project: Path, night: str) -> None:
    place = worktree.add(project, "last", night)
    made = commit(place, {"data/.gitignore": "/raw\n/corpus\n"})
    git(project, "update-ref", "refs/heads/nightly", made)
    ignored = {"data/.gitignore": "/raw\n/notes\n", ".gitignore": ".overnight\n.dvc/config.local\nran\n"}
    commit(project, {**ignored, "extra.dvc": "outs: []\nfrozen: true\n"})
    root = pin.worktree_of(project, "a", PUBLISH)
    assert (root / ".gitignore").read_text().endswith("\nran\n")
    assert (root / "data/.gitignore").read_text() == "/raw\n/corpus\n/notes\n"
    assert (root / "extra.dvc").read_text() == "outs: []\nfrozen: true\n"


def test_text_that_somebody_withdrew_stays_withdrawn_and_that_of_the_nights_stays(project: Path, night: str) -> None:
    commit(project, {"data/raw.dvc": text(project, "b", "p")})
    root = pin.worktree_of(project, "a", PUBLISH)
    assert names(root) == "bnp"
    assert (root / "dvc.lock").read_text() == "stages:"


def test_a_text_of_which_the_list_is_lost_is_left_to_people(project: Path, night: str) -> None:
    commit(project, {"data/raw.dvc": text(project, "b")})
    for listing in (project / ".dvc/cache").rglob("*.dir"):
        listing.unlink()
    with pytest.raises(pin.MustMerge, match=r"^data/raw\.dvc: changed both on the branch nightly"):
        pin.worktree_of(project, "a", PUBLISH)


@pytest.mark.parametrize(
    ("before", "ours", "theirs", "merged"),
    [
        ("a1 b1", "a1 b1 n1", "b1", "b1 n1"),
        ("", "n1", "p1", "n1 p1"),
        ("a1 b1", "a2 b1", "a1 b2", "a2 b2"),
        ("a1", "a2", "a3", "a3"),
        ("a1 b1", "a1", "a1 b1 p1", "a1 p1"),
    ],
)
def test_how_two_texts_become_one(before: str, ours: str, theirs: str, merged: str) -> None:
    def listing(files: str) -> raw.Listing:
        return {PurePosixPath(file[0]): file[1] for file in files.split()}

    assert raw.merge(listing(before), listing(ours), listing(theirs)) == listing(merged)


def test_the_same_lines_changed_twice_are_named(project: Path, night: str) -> None:
    place = worktree.add(project, "last", night)
    git(project, "update-ref", "refs/heads/nightly", commit(place, {"params.yaml": "steps: 3\nseed: 1\n"}))
    commit(project, {"params.yaml": "steps: 2\nseed: 1\n"})
    with pytest.raises(pin.MustMerge, match=r"params\.yaml: changed both on the branch nightly and in"):
        pin.worktree_of(project, "a", PUBLISH)


def test_a_merge_that_died_is_done_again(project: Path, night: str) -> None:
    base = commit(project, {"params.yaml": "steps: 2\nseed: 1\n"})
    root = worktree.add(project, "a", night)
    git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "merge", "-q", "--no-commit", "--no-ff", base)
    (root / "params.yaml").write_text("half")
    assert (pin.worktree_of(project, "a", PUBLISH) / "params.yaml").read_text() == "steps: 2\nseed: 1\n"


def test_the_remote_s_branches_count_where_they_are_further_on(project: Path, night: str, tmp_path: Path) -> None:
    remote, other = tmp_path / "remote", tmp_path / "other"
    subprocess.run(["git", "clone", "-q", "--bare", str(project), str(remote)], check=True)
    subprocess.run(["git", "clone", "-q", str(remote), str(other)], check=True)
    git(project, "remote", "add", "origin", str(remote))
    commit(other, {"params.yaml": "steps: 5\nseed: 1\n"})
    git(other, "push", "-q", "origin", "main")
    root = pin.worktree_of(project, "a", PublishParams(git_remote="origin"))
    assert (root / "params.yaml").read_text() == "steps: 5\nseed: 1\n"
    assert (root / "dvc.lock").read_text() == "stages:"


def test_a_remote_that_does_not_answer_is_worth_another_try(project: Path) -> None:
    git(project, "remote", "add", "origin", "/nowhere")
    with pytest.raises(TryAgain, match="'origin' cannot be read"):
        pin.worktree_of(project, "a", PublishParams(git_remote="origin"))
