"""Versions and the one in production: what the tags say, what GTO reads from them, and machines that tag at once."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows import registry
from flows.git import Declined, GitFailed, commit_of, git
from flows.registry import Event, NoSuchVersion, Version


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with three commits, whose user never told Git a name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    root = tmp_path / "here"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    for step in "abc":
        commit(root, step)
    return root


def commit(root: Path, name: str) -> str:
    (root / name).write_text(name)
    git(root, "add", name)
    git(root, "commit", "-q", "-m", name, environment=registry.author(root))
    return commit_of(root, "HEAD")


def clone(repository: Path, name: str) -> Path:
    """A second clone; the two share the bare repository `shared`."""
    shared = repository.parent / "shared.git"
    if not shared.exists():
        git(repository.parent, "clone", "-q", "--bare", str(repository), str(shared))
        git(repository, "remote", "add", "origin", str(shared))
    root = repository.parent / name
    git(repository.parent, "clone", "-q", str(shared), str(root))
    return root


def gto(root: Path, *arguments: str) -> str:
    program = Path(sys.executable).with_name("gto")
    return subprocess.run([program, *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def test_versions_are_numbered_from_1_0_0_and_read_back(repository: Path) -> None:
    first = registry.register(repository, commit_of(repository, "HEAD~2"), "The first.")
    second = registry.register(repository, commit_of(repository, "HEAD~1"), "The second.\n\n# with two lines")
    assert (first.name, first.tag, first.message, first.stages) == ("v1.0.0", "lm@v1.0.0", "The first.", ())
    assert (second.name, second.message) == ("v1.1.0", "The second.\n\n# with two lines")
    assert registry.versions(repository) == (first, second)
    assert git(repository, "tag").split() == ["lm@v1.0.0", "lm@v1.1.0"]
    assert (
        git(repository, "for-each-ref", "--format=%(objecttype) %(taggername)", "refs/tags/lm@v1.0.0")
        == "tag overnight"
    )


def test_a_commit_is_registered_once(repository: Path) -> None:
    head = commit_of(repository, "HEAD")
    assert registry.register(repository, head, "one") == registry.register(repository, head, "two")
    assert len(registry.versions(repository)) == 1


def test_the_user_s_name_stands_on_the_tag_where_git_knows_it(repository: Path) -> None:
    git(repository, "config", "user.name", "Ada")
    git(repository, "config", "user.email", "ada@localhost")
    registry.register(repository, commit_of(repository, "HEAD"), "one")
    assert git(repository, "for-each-ref", "--format=%(taggername)", "refs/tags") == "Ada"


def test_the_champion_is_the_one_promoted_last(repository: Path) -> None:
    assert registry.champion(repository) is None
    versions = [registry.register(repository, commit_of(repository, f"HEAD~{back}"), "-") for back in (2, 1, 0)]
    assert registry.champion(repository) is None
    for version in (*versions, versions[1]):
        # All within a second: the order has to come from the tags, not from the clock.
        assert registry.promote(repository, version, "better")
        champion = registry.champion(repository)
        assert champion is not None
        assert (champion.name, champion.stages) == (version.name, ("prod",))
        assert gto(repository, "show", "lm#prod", "--version").strip() == version.name
    assert not registry.promote(repository, versions[1], "again")
    assert git(repository, "tag", "--list", "lm#*").split() == [f"lm#prod#{number}" for number in (1, 2, 3, 4)]


def test_gto_shows_the_versions_and_the_stage(repository: Path) -> None:
    for back in (2, 1):
        version = registry.register(repository, commit_of(repository, f"HEAD~{back}"), "-")
    registry.promote(repository, version, "-")
    shown = json.loads(gto(repository, "show", "lm", "--json"))
    assert {entry["version"]: [stage["stage"] for stage in entry["stages"]] for entry in shown} == {
        "v1.0.0": [],
        "v1.1.0": ["prod"],
    }


def test_what_gto_registers_assigns_and_takes_back_is_seen(repository: Path) -> None:
    registry.promote(repository, registry.register(repository, commit_of(repository, "HEAD~2"), "-"), "-")
    with_name = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for tag in ("lm@v1.1.0", "lm#prod#9", "lm#staging#10"):
        git(repository, *with_name, "tag", "-a", "-m", "by hand", tag, "HEAD~1",
            environment={"GIT_COMMITTER_DATE": "2090-01-01 00:00:00 +0000"})  # fmt: skip
    champion = registry.champion(repository)
    assert champion is not None
    assert (champion.name, champion.stages) == ("v1.1.0", ("prod", "staging"))
    # A tag without a message of its own is not GTO's.
    git(repository, "tag", "lm@v7.0.0", "HEAD")
    assert len(registry.versions(repository)) == 2

    git(repository, *with_name, "tag", "-a", "-m", "no", "lm#prod!#11", "HEAD~1",
        environment={"GIT_COMMITTER_DATE": "2090-01-01 00:00:01 +0000"})  # fmt: skip
    champion = registry.champion(repository)
    assert champion is not None
    assert champion.name == gto(repository, "show", "lm#prod", "--version").strip() == "v1.0.0"
    git(repository, *with_name, "tag", "-a", "-m", "no", "lm@v1.1.0!#12", "HEAD~1",
        environment={"GIT_COMMITTER_DATE": "2090-01-01 00:00:02 +0000"})  # fmt: skip
    assert [version.name for version in registry.versions(repository)] == ["v1.0.0"]
    # A number that was taken back is not given again, and a promotion counts though other clocks are ahead.
    new = registry.register(repository, commit_of(repository, "HEAD"), "-")
    assert new.name == "v1.2.0"
    registry.promote(repository, new, "-")
    assert gto(repository, "show", "lm#prod", "--version").strip() == "v1.2.0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("v1.0.0", "v1.0.0"), ("lm@v1.1.0", "v1.1.0"), ("latest", "v1.2.0"), ("prod", "v1.1.0")],
)
def test_names_of_a_version(repository: Path, text: str, expected: str) -> None:
    versions = [registry.register(repository, commit_of(repository, f"HEAD~{back}"), "-") for back in (2, 1, 0)]
    registry.promote(repository, versions[1], "-")
    assert registry.resolve(repository, text).name == expected


def test_an_unknown_version_is_told_with_those_that_there_are(repository: Path) -> None:
    with pytest.raises(NoSuchVersion, match="nor any other yet"):
        registry.resolve(repository, "latest")
    registry.register(repository, commit_of(repository, "HEAD"), "-")
    with pytest.raises(NoSuchVersion, match=r"no version 'v2.0.0'; there are v1.0.0 \("):
        registry.resolve(repository, "v2.0.0")
    with pytest.raises(NoSuchVersion, match=r"`overnight promote v1.0.0`"):
        registry.resolve(repository, "prod")


def stage(commit: str, count: int, message: str = "", *, cancels: bool = False) -> Event:
    return Event("", None, "prod", cancels, count, commit, count, message)


BACK = "Rolled back from v1.2.0."


@pytest.mark.parametrize(
    ("events", "line"),
    [
        ([], ""),
        ([stage("a", 1), stage("b", 2), stage("c", 3)], "abc"),
        # Rolled back to b; once more would lead to a, not to c again.
        ([stage("a", 1), stage("b", 2), stage("c", 3), stage("b", 4, BACK)], "ab"),
        # An old one that was promoted: back from there leads to what it replaced, and then as before.
        ([stage("a", 1), stage("b", 2), stage("c", 3), stage("a", 4), stage("a", 5)], "abca"),
        ([stage("a", 1), stage("b", 2), stage("c", 3), stage("a", 4), stage("c", 5, BACK)], "abc"),
        ([stage("a", 1), stage("b", 2), stage("a", 3, BACK), stage("b", 4)], "ab"),
        ([stage("a", 1), stage("b", 2), stage("b", 3, cancels=True)], "a"),
    ],
)
def test_where_a_rollback_leads(events: list[Event], line: str) -> None:
    assert "".join(registry.history(events)) == line


def test_two_machines_that_register_at_once_get_two_numbers(repository: Path) -> None:
    roots = [clone(repository, name) for name in ("one", "two", "three")]
    commits = [commit(root, root.name) for root in roots]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda root, commit: registry.register(root, commit, "-", "origin"), roots, commits))
    shared = registry.versions(repository.parent / "shared.git")
    assert [version.name for version in shared] == ["v1.0.0", "v1.1.0", "v1.2.0"]
    assert {version.commit for version in shared} == set(commits)
    for root in roots:
        registry.fetch(root, "origin")
        assert registry.versions(root) == shared


def test_two_machines_that_promote_at_once_see_each_other(repository: Path) -> None:
    roots = [clone(repository, name) for name in ("one", "two")]
    versions = [registry.register(root, commit(root, root.name), "-", "origin") for root in roots]
    seen: list[Version | None] = []

    def promote(root: Path, version: Version) -> bool:
        return registry.promote(root, version, "-", "origin", before=seen.append)

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(promote, roots, versions)) == [True, True]
    shared = repository.parent / "shared.git"
    tags = git(shared, "for-each-ref", "--format=%(refname:strip=2)", "refs/tags/lm#*").split()
    assert tags == ["lm#prod#1", "lm#prod#2"]
    # Whoever came second was shown the first one's champion before its own took that place.
    assert {one.name for one in seen if one is not None} <= {"v1.0.0", "v1.1.0"}
    assert any(one is not None for one in seen)


def test_whoever_is_shown_an_unexpected_champion_can_stop(repository: Path) -> None:
    here, there = clone(repository, "one"), clone(repository, "two")
    ours = registry.register(here, commit(here, "ours"), "-", "origin")
    theirs = registry.register(there, commit(there, "theirs"), "-", "origin")
    registry.promote(there, theirs, "-", "origin")

    def refuse(champion: Version | None) -> None:
        assert champion is not None
        raise RuntimeError(champion.name)

    with pytest.raises(RuntimeError, match=theirs.name):
        registry.promote(here, ours, "-", "origin", before=refuse)
    champion = registry.champion(here)
    assert champion is not None
    assert champion.name == theirs.name


def crashes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the next push of a tag die as a killed process does; returns what mends it."""
    real = registry._push

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "_push", die)
    return lambda: monkeypatch.setattr(registry, "_push", real)


@pytest.mark.parametrize("another", [False, True])
def test_a_tag_that_was_not_pushed_is_pushed_or_makes_way(
    repository: Path, monkeypatch: pytest.MonkeyPatch, another: bool
) -> None:
    here, there = clone(repository, "one"), clone(repository, "two")
    head = commit(here, "ours")
    mend = crashes(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        registry.register(here, head, "-", "origin")
    mend()
    if another:
        registry.register(there, commit(there, "theirs"), "-", "origin")
    version = registry.register(here, head, "-", "origin")
    assert version.name == ("v1.1.0" if another else "v1.0.0")
    shared = registry.versions(repository.parent / "shared.git")
    assert [one.commit for one in shared].count(head) == 1
    assert len(shared) == 1 + another


def test_a_remote_that_is_gone_is_one_line(repository: Path) -> None:
    root = clone(repository, "one")
    git(root, "remote", "set-url", "origin", str(repository.parent / "nowhere"))
    with pytest.raises(GitFailed, match="git fetch --quiet failed"):
        registry.register(root, commit_of(root, "HEAD"), "-", "origin")
    assert registry.versions(root) == ()


def test_a_tag_that_the_remote_refuses_holds_nowhere(repository: Path) -> None:
    root = clone(repository, "one")
    version = registry.register(root, commit_of(root, "HEAD~1"), "-", "origin")
    hook = repository.parent / "shared.git/hooks/update"
    hook.write_text("#!/bin/sh\necho asked >> asked\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(Declined, match="git push --quiet failed"):
        registry.register(root, commit_of(root, "HEAD"), "-", "origin")
    with pytest.raises(Declined, match="git push --quiet failed"):
        registry.promote(root, version, "-", "origin")
    assert (repository.parent / "shared.git/asked").read_text() == "asked\n" * 2
    assert registry.versions(root) == (version,)
    assert registry.champion(root) is None
    hook.unlink()
    assert registry.promote(root, version, "-", "origin")


def test_a_version_that_was_moved_at_the_remote_is_told(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old, new = (commit_of(repository, revision) for revision in ("HEAD~1", "HEAD"))
    there = clone(repository, "there")
    registry.register(repository, old, "one", "origin")
    registry.fetch(there, "origin")
    git(there, "tag", "--force", "-a", "-m", "moved", "lm@v1.0.0", new, environment=registry.author(there))
    git(there, "push", "-q", "--force", "origin", "refs/tags/lm@v1.0.0")
    assert capfd.readouterr().err == ""

    registry.fetch(repository, "origin")
    told = f"has moved versions that were known here: lm@v1.0.0 from {old[:12]} to {new[:12]}.\n"
    assert capfd.readouterr().err == f"the Git remote 'origin', which decides, {told}"
    assert registry.versions(repository)[0].commit == new
    registry.fetch(repository, "origin")
    assert capfd.readouterr().err == ""


def test_a_number_that_another_machine_took_first_was_not_moved(
    repository: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = clone(repository, "there")
    push = registry._push

    def later(root: Path, remote: str | None, tag: str) -> None:
        monkeypatch.setattr(registry, "_push", push)
        registry.register(there, commit_of(there, "HEAD~1"), "theirs", "origin")
        push(root, remote, tag)

    monkeypatch.setattr(registry, "_push", later)
    assert registry.register(repository, commit_of(repository, "HEAD"), "ours", "origin").name == "v1.1.0"
    assert capfd.readouterr().err == ""
