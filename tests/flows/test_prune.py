"""What no kept version needs goes, and never a byte of a version."""

import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from processes import leave_lock
from publishing import Clone
from rich.console import Console

from flows import contents, dvc, lock, objects, prune, rebuild, registry, runs, worktree
from flows.git import commit_of, git
from flows.lock import Held
from flows.prune import REMOTE_GRACE_SECONDS
from flows.publish import publish
from flows.store import Stored
from tasks.errors import TryAgain, UserMistake


def pruned(*, yes: bool = True, remote: bool = False) -> str:
    out, err = (Console(file=io.StringIO(), width=80) for _ in range(2))
    assert prune.prune(yes, remote, out, err) == 0
    return str(out.file.getvalue() + err.file.getvalue())  # type: ignore[attr-defined]


def cached(clone: Clone) -> set[str]:
    with dvc.store(clone.root) as store:
        return set(store.cached())


def needed(clone: Clone, *names: str) -> set[str]:
    with dvc.store(clone.root) as store:
        commits = [registry.resolve(clone.root, name).commit for name in names]
        return set().union(*(objects.needed(store, contents.recorded(clone.root, commit), {}) for commit in commits))


def check_versions_come_back(clone: Clone, places: dict[str, dict[str, bytes]]) -> None:
    """Fails when a version's files are not the bytes that they were, taken from the cache alone."""
    for name, files in places.items():
        place = worktree.add(clone.root, name, registry.resolve(clone.root, name).commit)
        dataclasses.replace(clone, root=place).dvc("checkout", "-q")
        assert files_of(place) == files
        worktree.remove(clone.root, name)


def files_of(root: Path) -> dict[str, bytes]:
    files = (file for folder in ("data", "models") for file in (root / folder).rglob("*") if file.is_file())
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def make_surplus(clone: Clone) -> None:
    """Runs twice with nothing published in between, so that nobody needs what the first one made."""
    for text in ("Soon overwritten.\n", "What is there now.\n"):
        clone.write("c.txt", text)
        clone.run()


def make_old(clone: Clone) -> None:
    past = time.time() - 2 * REMOTE_GRACE_SECONDS
    for file in clone.shelf.rglob("*"):
        os.utime(file, (past, past))


def test_versions_and_the_present_state_keep_every_byte(published: Clone) -> None:
    versions = {"v1.1.0": files_of(published.root)}
    make_surplus(published)
    before, present = cached(published), files_of(published.root)

    told = pruned(yes=False)
    assert cached(published) == before
    assert told.splitlines()[-1].endswith("in all; `overnight prune --yes` removes it.")
    assert "removed" in pruned()
    after = cached(published)
    assert after < before
    assert needed(published, "v1.0.0", "v1.1.0") <= after
    check_versions_come_back(published, versions)
    # What is here and not committed is kept too, and is still a version to be.
    assert files_of(published.root) == present
    assert dvc.changes(published.root).stages == {}
    assert publish(published.root).new
    published.check_remote()
    assert pruned() == "nothing to remove: all that is there is needed.\n"
    # DVC does not take what is gone for a result that it could bring back.
    published.write("c.txt", "Soon overwritten.\n")
    published.run()
    assert (published.root / "models/int8/config.json").read_text().endswith("Soon overwritten.\n")


def test_branches_and_worktrees_of_others_are_kept(published: Clone) -> None:
    git(published.root, "switch", "-q", "-c", "experiment")
    make_surplus(published)
    published.commit("An experiment")
    experiment = cached(published)
    git(published.root, "switch", "-q", "main")
    published.dvc("checkout", "-q")
    night = Clone(worktree.add(published.root, "night", "main"), published.shared, published.shelf)
    night.write("n.txt", "Uncommitted.\n")
    night.run()
    os.chdir(published.root)
    whole = cached(published)
    assert "models/int8" in str([one.path for one in contents.present(night.root)])
    pruned()
    kept = cached(published)
    with dvc.store(published.root) as store:
        for commit in (commit_of(published.root, "experiment"), commit_of(published.root, "main")):
            assert objects.needed(store, contents.recorded(published.root, commit), {}) <= kept
        assert objects.needed(store, contents.present(night.root), {}) <= kept
    # The first of the two runs on the branch, and nothing else.
    assert 0 < len(whole - kept) < len(experiment)


def test_every_stash_is_kept_and_what_can_be_found_of_one_that_lost_a_list(published: Clone) -> None:
    wanted = set[str]()
    for text in ("Of the first.\n", "Of the second.\n"):
        published.write("s.txt", text)
        published.run()
        with dvc.store(published.root) as store:
            wanted |= objects.needed(store, contents.present(published.root), {})
        git(published.root, "stash", "-q", environment=registry.author(published.root))
    published.dvc("checkout", "-q")
    (model,) = (one for one in contents.recorded(published.root, "stash@{1}") if one.path == Path("models/int8"))
    with dvc.store(published.root) as store:
        of_model = objects.needed(store, [model], {})
        store.discard([model.md5])
    assert "stash@{1}: models/int8" in pruned()
    assert wanted - cached(published) <= of_model


def test_text_that_was_committed_and_never_used_is_kept(published: Clone) -> None:
    git(published.root, "switch", "-q", "-c", "collected")
    published.write("t.txt", "Of no run.\n")
    published.dvc("add", "-q", "data/raw")
    (published.root / "dvc.lock").unlink()
    published.commit("Text")
    with dvc.store(published.root) as store:
        wanted = objects.needed(store, contents.present(published.root), {})
    git(published.root, "switch", "-q", "--force", "main")
    pruned()
    assert wanted <= cached(published)


def test_the_remote_keeps_versions_that_only_other_machines_know(published: Clone) -> None:
    make_surplus(published)
    published.dvc("push", "-q")
    other = published.clone("other")
    git(other.root, "fetch", "-q", "--tags", "origin")
    other.dvc("pull", "-q")
    other.write("d.txt", "Of the other.\n")
    other.run()
    publish(other.root)
    os.chdir(published.root)
    # The pointers of the pushed state are lost: nobody needs it.
    git(published.root, "checkout", "-q", "--", ".")

    def stored() -> set[str]:
        with dvc.store(published.root) as store:
            return set(store.stored())

    before = stored()
    pruned(remote=True)
    # As new as a version that another machine is about to publish.
    assert stored() == before
    make_old(published)
    assert "DVC's remote 'shelf'" in pruned(remote=True, yes=False)
    assert stored() == before
    assert "DVC's remote 'shelf'" in pruned(remote=True)
    assert stored() < before
    published.check_remote()
    assert len(registry.versions(published.shared)) == 3
    # DVC pushes once more what it had pushed before.
    published.dvc("pull", "-q", "--force")
    published.write("c.txt", "What is there now.\n")
    published.run()
    publish(published.root)
    published.check_remote()


def test_what_another_machine_publishes_while_the_remote_is_pruned_stays_whole(
    published: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_surplus(published)
    published.dvc("push", "-q")
    git(published.root, "checkout", "-q", "--", ".")
    make_old(published)
    other = published.clone("other")
    git(other.root, "fetch", "-q", "--tags", "origin")
    other.dvc("pull", "-q")
    # What the remote has since long, and nobody has named so far.
    other.write("c.txt", "What is there now.\n")
    other.run()
    os.chdir(published.root)
    show = prune._show

    def publish_meanwhile(*arguments: Any) -> None:
        show(*arguments)
        with contextlib.chdir(other.root):
            assert publish(other.root).new

    monkeypatch.setattr(prune, "_show", publish_meanwhile)
    assert "DVC's remote 'shelf'" in pruned(remote=True)
    assert len(registry.versions(published.shared)) == 3
    published.check_remote()


def test_a_git_remote_that_is_misspelt_is_a_mistake_and_no_silence(published: Clone) -> None:
    published.set("publish", "git_remote", "orign")
    with pytest.raises(UserMistake, match=r"publish\.git_remote: Git has no remote 'orign'"):
        pruned(remote=True)


def test_without_a_git_remote_nobody_knows_what_others_keep(published: Clone) -> None:
    published.set("publish", "git_remote", None)
    with pytest.raises(UserMistake, match=r"^--remote: other machines may keep versions there"):
        pruned(remote=True)
    published.set("publish", "git_remote", "origin")
    git(published.root, "remote", "set-url", "origin", "nowhere")
    with pytest.raises(TryAgain, match="does not answer, so nothing is pruned"):
        pruned(remote=True)


def test_nothing_goes_while_a_run_is_at_work(published: Clone) -> None:
    told = r"run a-run .*\. `overnight prune` when it has ended\.$"
    with lock.hold(published.root, "a-run"), pytest.raises(Held, match=told):
        pruned()


def test_what_a_killed_run_has_left_at_work_is_waited_for_and_told(
    published: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_SECONDS_UNTOLD", 0.0)
    leave_lock(published.root, seconds=1.0)
    assert "what was at work here has ended, " in pruned(yes=False)


def test_a_version_whose_list_of_files_is_lost_stops_it(published: Clone) -> None:
    before = cached(published)
    commit = registry.resolve(published.root, "v1.0.0").commit
    (raw,) = (one for one in contents.recorded(published.root, commit) if one.path == Path("data/raw"))
    with dvc.store(published.root) as store:
        store.discard([raw.md5])
        # It is fetched from the remote, as long as that has it.
        pruned()
        store.discard([raw.md5], remote=True)
    with pytest.raises(UserMistake, match=r"^v1.0.0: data/raw .* is not in DVC's cache, nor at the remote 'shelf'"):
        pruned()
    assert cached(published) >= before - {raw.md5}


def test_a_cache_that_others_share_is_not_touched(published: Clone, tmp_path: Path) -> None:
    with (published.root / ".dvc/config.local").open("a") as file:
        file.write(f"[cache]\n    dir = {tmp_path / 'elsewhere'}\n")
    with pytest.raises(UserMistake, match="lies outside the project, so other projects may use it"):
        pruned()


def test_checkpoints_and_half_written_files(published: Clone) -> None:
    checkpoints = published.root / ".overnight/checkpoints"
    for name in ("quantize/old", "quantize/new", "evaluate/only"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "step-1.pt").write_bytes(b"0" * 2048)
        time.sleep(0.01)
    (published.root / "data/.partial-new-1/.partial-new-2").mkdir(parents=True)
    published.set("train", "learning_rate", 0.1)
    told = pruned(yes=False)
    assert told.count(".partial-new-1") == 1
    assert [line for line in told.splitlines() if "checkpoints" in line] == [
        ".overnight/checkpoints/quantize/old: checkpoints of a run that is over, 2.0 KiB"
    ]
    pruned()
    # Both stages have to run: each goes on from its newest checkpoint.
    assert sorted(path.name for path in checkpoints.glob("*/*")) == ["new", "only"]
    assert not (published.root / "data/.partial-new-1").exists()
    published.run()
    pruned()
    assert list(checkpoints.glob("*/*")) == []


def run(name: str, state: str, day: int, pid: int = 2**22 + 1) -> runs.Run:
    at = datetime(2026, 1, day, tzinfo=UTC)
    return runs.Run(run=name, pid=pid, started=at, since=at, state=state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([], []),
        # Nothing came after it: it can go on.
        ([("a", "failed")], []),
        ([("a", "completed"), ("b", "failed")], ["a"]),
        ([("a", "failed"), ("b", "running"), ("c", "completed")], ["a", "b", "c"]),
        ([("a", "failed"), ("b", "refused"), ("c", "stopped")], ["a", "b"]),
        # A night that was skipped makes nothing obsolete.
        ([("a", "failed"), ("b", "skipped")], []),
    ],
)
def test_runs_that_nobody_goes_on_with(known: Iterable[tuple[str, str]], expected: list[str]) -> None:
    # The clock went back between them: the list is in order all the same.
    found = prune.finished([run(name, state, 9 - place) for place, (name, state) in enumerate(known)])
    assert [one.run for one in found] == expected


def test_the_worktree_of_a_run_that_is_over(published: Clone) -> None:
    for name in ("over", "recent"):
        place = worktree.add(published.root, name, "HEAD")
        (place / "large").write_bytes(b"0" * 4096)
    folder = published.root / runs.RUNS
    folder.mkdir(parents=True)
    for day, (name, state) in enumerate([("over", "failed"), ("well", "completed"), ("recent", "failed")], start=1):
        (folder / f"{name}.json").write_text(run(name, state, day).model_dump_json())
    assert ".overnight/worktrees/over: the worktree of a run that is over" in pruned()
    assert list(worktree.names(published.root)) == ["recent"]


def test_what_rebuilds_and_killed_restorations_leave(published: Clone) -> None:
    worktree.add(published.root, "rebuild-v1.0.0", registry.resolve(published.root, "v1.0.0").commit)
    environments = published.root / ".overnight/environments"
    (environments / "abc/bin").mkdir(parents=True)
    (environments / "abc.ready").touch()
    with dvc.store(published.root) as store:
        dead, living = (store.folder / f"00/.partial-{pid}-1-x" for pid in (2**22 + 1, os.getpid()))
    dead.parent.mkdir(exist_ok=True)
    for file in (dead, living):
        file.write_text("half")
    with rebuild.alone(published.root, "v1.0.0"):
        told = pruned()
    assert ".partial-4194305-1-x: half-written when a command was killed" in told
    assert [path.exists() for path in (dead, living, environments / "abc")] == [False, True, True]
    assert list(worktree.names(published.root)) == ["rebuild-v1.0.0"]
    told = pruned()
    assert "rebuild-v1.0.0: the worktree of a rebuild that is over" in told
    assert list(worktree.names(published.root)) == []
    assert list(environments.iterdir()) == []


def test_what_is_new_at_a_remote_may_be_about_to_get_its_version() -> None:
    now = 1e9
    stored = {
        "needed": Stored(1, None),
        "old": Stored(2, now - REMOTE_GRACE_SECONDS - 1),
        "new": Stored(4, now - REMOTE_GRACE_SECONDS + 1),
        "of unknown age": Stored(8, None),
    }
    assert prune.surplus(stored, {"needed"}, now) == {"old": 2, "of unknown age": 8}
