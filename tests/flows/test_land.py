"""A version's commit becomes part of a branch that others move too, and nothing of theirs is lost."""

import os
import subprocess
import sys

import publishing
from publishing import Clone, nightly

from flows import publish, registry
from flows.git import commit_of, git, show


def test_a_night_in_its_worktree_publishes_onto_the_branch_of_nights(publisher: Clone) -> None:
    main = commit_of(publisher.root, "main")
    first = publish.publish(nightly(publisher, "one", "The first night.\n").root)
    assert first.promoted
    assert commit_of(publisher.root, "nightly") == commit_of(publisher.shared, "nightly") == first.commit
    # The second started from the same commit, and knew nothing of the first.
    second = publish.publish(nightly(publisher, "two", "The second night.\n").root)
    tip = commit_of(publisher.shared, "nightly")
    assert commit_of(publisher.root, "nightly") == tip
    for version in (first, second):
        assert git(publisher.root, "merge-base", tip, version.commit) == version.commit
    # What the tip records is what the second version records.
    assert show(publisher.root, tip, "dvc.lock") == show(publisher.root, second.commit, "dvc.lock")
    assert commit_of(publisher.root, "main") == commit_of(publisher.shared, "main") == main
    assert [version.name for version in registry.versions(publisher.shared)] == ["v1.0.0", "v1.1.0"]


def test_code_that_changed_on_both_sides_is_left_to_people(publisher: Clone) -> None:
    night = nightly(publisher, "one", "The first night.\n")
    git(publisher.root, "switch", "-q", "-c", "nightly")
    (publisher.root / "stage.py").write_text("raise SystemExit\n")
    theirs = publisher.commit("Theirs")
    git(publisher.root, "push", "-q", "origin", "nightly")
    git(publisher.root, "switch", "-q", "main")
    (night.root / "stage.py").write_text(publishing.STAGE + "# ours\n")
    git(night.root, "commit", "-q", "-a", "-m", "Ours", environment=registry.author(night.root))
    night.run()
    done = publish.publish(night.root)
    assert done.new
    assert "not on the branch nightly, where stage.py changed too" in done.reasons[0]
    assert commit_of(publisher.shared, "nightly") == commit_of(publisher.root, "nightly") == theirs
    # Its tag keeps it.
    assert "lm@v1.0.0" in publisher.tags()
    publisher.check_remote()


def test_a_branch_that_somebody_works_on_stays_where_it_is(publisher: Clone) -> None:
    night = nightly(publisher, "one", "The first night.\n")
    git(publisher.root, "stash", "-q", "--include-untracked")
    git(publisher.root, "switch", "-q", "-c", "nightly")
    before = commit_of(publisher.root, "nightly")
    done = publish.publish(night.root)
    assert f"checked out in {publisher.root} and stays where it is" in done.reasons[0]
    assert commit_of(publisher.root, "nightly") == before
    assert commit_of(publisher.shared, "nightly") == done.commit


def publish_elsewhere(publisher: Clone) -> "subprocess.Popen[str]":
    code = (
        "from pathlib import Path\nfrom flows.publish import publish\n"
        "done = publish(Path.cwd())\nprint(done.version.name, done.new)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=publisher.root, env={**os.environ, "PYTHONPATH": str(publishing.REPOSITORY)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_two_machines_that_publish_at_once_lose_nothing(publisher: Clone) -> None:
    # Nothing is promoted, so that neither has to measure again.
    publisher.set("publish", "promote", False)
    publisher.commit()
    git(publisher.root, "push", "-q", "origin", "main")
    machines = [publisher.clone(name) for name in ("left", "right")]
    for machine in machines:
        machine.write(f"{machine.root.name}.txt", f"What {machine.root.name} has found.\n")
        machine.run()
    started = [publish_elsewhere(machine) for machine in machines]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert sorted(out for out, _ in ended) == ["v1.0.0 True\n", "v1.1.0 True\n"]
    tip = commit_of(publisher.shared, "main")
    shared = registry.versions(publisher.shared)
    assert {version.name for version in shared} == {"v1.0.0", "v1.1.0"}
    for version in shared:
        assert git(publisher.shared, "merge-base", tip, version.commit) == version.commit
    publisher.check_remote()
