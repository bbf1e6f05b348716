"""A version is made whole, once, and in an order in which no tag names bytes that are nowhere."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import leave_lock
from publishing import Clone, nightly
from rich.console import Console

from flows import dvc, land, lock, project, publish, registry, worktree
from flows.git import GitFailed, commit_of, git, show
from flows.publish import ChampionMoved
from tasks.errors import TryAgain, UserMistake


def test_a_version_is_pushed_committed_registered_and_promoted(publisher: Clone) -> None:
    # As training leaves it.
    (publisher.root / "speed").mkdir()
    (publisher.root / "speed/train.csv").write_text("step,tokens_per_second\n")
    done = publish.publish(publisher.root)
    assert (done.version.name, done.new, done.promoted, done.reasons) == ("v1.0.0", True, True, ())
    assert publisher.tags() == ["lm#prod#1", "lm@v1.0.0"]
    publisher.check_remote()
    # On the branch that is checked out, and nothing is left uncommitted.
    assert commit_of(publisher.root, "main") == commit_of(publisher.shared, "main") == done.commit
    assert git(publisher.root, "status", "--porcelain") == ""
    names = git(publisher.root, "ls-tree", "-r", "--name-only", done.commit).split()
    pointers = {"data/raw.dvc", "models/champion.dvc", "dvc.lock", "data/.gitignore"}
    assert pointers | {"environment.json", "speed/train.csv"} <= set(names)
    assert json.loads(show(publisher.root, done.commit, "environment.json") or b"")["python"]
    assert done.version.message == "The gate passed.\n\nagainst_champion: a loss of 0.25"
    assert git(publisher.root, "log", "-1", "--format=%an <%ae>") == "overnight <overnight@localhost>"

    again = publish.publish(publisher.root)
    assert (again.version.name, again.new, again.promoted) == ("v1.0.0", False, False)
    assert again.reasons == ("nothing new since v1.0.0",)
    assert len(publisher.tags()) == 2
    assert commit_of(publisher.root, "main") == done.commit


def test_what_the_gate_refuses_is_a_version_but_no_champion(publisher: Clone) -> None:
    first = publish.publish(publisher.root)
    publisher.set("train", "learning_rate", 0.75)
    publisher.commit()
    publisher.run()
    done = publish.publish(publisher.root)
    assert (done.version.name, done.new, done.promoted, done.reasons) == ("v1.1.0", True, False, ("a loss of 0.75",))
    assert done.version.message.startswith("Refused by the gate: a loss of 0.75\n")
    assert registry.champion(publisher.root) == registry.resolve(publisher.root, first.version.name)
    again = publish.publish(publisher.root)
    assert (again.promoted, again.reasons) == (False, ("nothing new since v1.1.0", "a loss of 0.75"))
    publisher.check_remote()


def test_what_was_rolled_back_is_not_promoted_again(publisher: Clone) -> None:
    first = publish.publish(publisher.root)
    publisher.write("b.txt", "And the second.\n")
    publisher.run()
    assert publish.publish(publisher.root).promoted
    registry.promote(publisher.root, first.version, "Rolled back.", "origin")
    assert publish.publish(publisher.root).reasons == ("nothing new since v1.1.0",)
    champion = registry.champion(publisher.root)
    assert champion is not None
    assert champion.name == "v1.0.0"


def test_promotion_can_be_left_to_people(publisher: Clone) -> None:
    publisher.set("publish", "promote", False)
    publisher.commit()
    done = publish.publish(publisher.root)
    assert (done.new, done.promoted) == (True, False)
    assert "publish.promote is false" in done.reasons[0]
    publisher.set("publish", "promote", True)
    publisher.commit()
    assert publish.publish(publisher.root).promoted


def test_without_remotes_versions_stay_here(publisher: Clone) -> None:
    publisher.set("publish", "git_remote", None)
    settings = (publisher.root / ".dvc/config").read_text()
    (publisher.root / ".dvc/config").write_text("")
    publisher.commit()
    told: list[str] = []
    done = publish.publish(publisher.root, told.append)
    assert (done.version.name, done.promoted) == ("v1.0.0", True)
    assert publisher.tags() == []
    assert "no DVC remote" in told[0]

    # A team from now on: what was made before goes there whole, before its tag does.
    publisher.set("publish", "git_remote", "origin")
    (publisher.root / ".dvc/config").write_text(settings)
    head = publisher.commit("Where versions go")
    done = publish.publish(publisher.root)
    assert (done.new, done.reasons) == (False, ("nothing new since v1.0.0",))
    assert publisher.tags() == ["lm#prod#1", "lm@v1.0.0"]
    assert commit_of(publisher.shared, "main") == head
    publisher.check_remote()


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


def test_killed_after_each_step_in_turn_it_ends_as_one_version(
    publisher: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[object, str]] = [
        (publish, "_push_data"),
        (publish, "_commit"),
        (publish, "_verify_data"),
        (land, "_move"),
        (publish, "land"),
        (registry, "_tag"),
        (publish.registry, "register"),
        (publish.registry, "promote"),
    ]
    for where, name in steps:
        real: Callable[..., object] = getattr(where, name)

        def die(*arguments: object, real: Callable[..., object] = real, **more: object) -> None:
            real(*arguments, **more)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(where, name, die)
            with pytest.raises(Killed):
                publish.publish(publisher.root)
        publisher.check_remote()
    done = publish.publish(publisher.root)
    assert (done.version.name, done.reasons) == ("v1.0.0", ("nothing new since v1.0.0",))
    assert publisher.tags() == ["lm#prod#1", "lm@v1.0.0"]
    assert git(publisher.root, "log", "--format=%s", "main").split("\n") == [
        "The data and models of a run",
        "The project",
    ]
    publisher.check_remote()


def test_killed_before_a_promotion_is_pushed_it_is_pushed_next_time(
    publisher: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = registry._push

    def die_at_promotion(root: Path, remote: str | None, tag: str) -> None:
        if "#" in tag:
            raise Killed
        real(root, remote, tag)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_push", die_at_promotion)
        with pytest.raises(Killed):
            publish.publish(publisher.root)
    assert publisher.tags() == ["lm@v1.0.0"]
    publish.publish(publisher.root)
    assert publisher.tags() == ["lm#prod#1", "lm@v1.0.0"]


@pytest.mark.parametrize(("rate", "promoted", "reasons"), [(0.25, True, ()), (0.75, False, ("a loss of 0.75",))])
def test_a_night_that_was_killed_late_is_not_told_as_one_without_news(
    publisher: Clone, monkeypatch: pytest.MonkeyPatch, rate: float, promoted: bool, reasons: tuple[str, ...]
) -> None:
    publisher.set("train", "learning_rate", rate)
    publisher.commit()
    night = nightly(publisher, "one", "The first night.\n")
    since = commit_of(night.root, "HEAD")
    with monkeypatch.context() as patch:
        patch.setattr(publish, "Published", _die)
        with pytest.raises(Killed):
            publish.publish(night.root, since=since)
    done = publish.publish(night.root, since=since)
    assert (done.version.name, done.new, done.promoted, done.reasons) == ("v1.0.0", True, promoted, reasons)
    # The night after begins with that commit.
    done = publish.publish(night.root, since=done.commit)
    assert (done.new, done.promoted, done.reasons[0]) == (False, False, "nothing new since v1.0.0")


def _die(*_: object) -> None:
    raise Killed


def overtaking(publisher: Clone) -> Clone:
    """Another machine that has measured a model of its own against v1.0.0, as ``publisher`` has done with its next."""
    publish.publish(publisher.root)
    other = publisher.clone("other")
    git(other.root, "fetch", "-q", "--tags", "origin")
    other.dvc("pull", "-q")
    other.write("b.txt", "Of the other.\n")
    other.run()
    publisher.write("c.txt", "Of ours.\n")
    publisher.run()
    return other


def test_a_champion_that_moved_meanwhile_has_the_model_measured_again(publisher: Clone) -> None:
    other = overtaking(publisher)
    assert publisher.evaluation()["against"] == "lm@v1.0.0"
    os.chdir(other.root)
    assert publish.publish(other.root).promoted

    os.chdir(publisher.root)
    with pytest.raises(ChampionMoved, match=r"from lm@v1.0.0 to lm@v1.1.0 since") as caught:
        publish.publish(publisher.root)
    assert caught.value.exit_code == 75
    assert [version.name for version in registry.versions(publisher.shared)] == ["v1.0.0", "v1.1.0"]
    # The new champion lies there, and what reads it is stale, nothing else.
    assert list(dvc.changes(publisher.root).stages) == ["evaluate"]
    publisher.run()
    assert publisher.evaluation()["against"] == "lm@v1.1.0"
    done = publish.publish(publisher.root)
    assert (done.version.name, done.promoted) == ("v1.2.0", True)


def test_a_champion_that_moves_after_the_version_is_registered_leaves_it_the_only_one_of_its_model(
    publisher: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = overtaking(publisher)
    register = registry.register

    def register_and_be_overtaken(*arguments: Any) -> registry.Version:
        version = register(*arguments)
        monkeypatch.setattr(registry, "register", register)
        os.chdir(other.root)
        assert publish.publish(other.root).promoted
        os.chdir(publisher.root)
        return version

    os.chdir(publisher.root)
    monkeypatch.setattr(registry, "register", register_and_be_overtaken)
    done = publish.publish(publisher.root)
    assert (done.version.name, done.new, done.promoted) == ("v1.1.0", True, False)
    assert done.reasons == ("measured against lm@v1.0.0, which is not the champion",)
    publish.publish(publisher.root)
    assert [version.name for version in registry.versions(publisher.shared)] == ["v1.0.0", "v1.1.0", "v1.2.0"]
    champion = registry.champion(publisher.root)
    assert champion is not None
    assert champion.name == "v1.2.0"


def test_stale_outputs_are_not_published(publisher: Clone) -> None:
    publisher.write("b.txt", "New.\n")
    with pytest.raises(UserMistake, match=r"not up to date. `overnight run`, then publish"):
        publish.publish(publisher.root)
    assert publisher.tags() == []


@pytest.mark.parametrize("name", ["README.md", "params.yaml", "tasks/new.py"])
def test_what_is_not_committed_would_be_missing(publisher: Clone, name: str) -> None:
    (publisher.root / "README.md").write_text("Words.\n")
    (publisher.root / "tasks").mkdir()
    (publisher.root / "tasks/old.py").write_text("")
    dag = (publisher.root / "dvc.yaml").read_text()
    (publisher.root / "dvc.yaml").write_text(
        dag.replace("deps: [data/raw, stage.py]", "deps: [data/raw, stage.py, tasks]")
    )
    publisher.commit()
    with (publisher.root / name).open("a") as file:
        file.write("# an edit\n")
    # Untracked and read by no stage.
    (publisher.root / "notes.txt").write_text("mine")
    publisher.run()
    with pytest.raises(UserMistake, match=f"^{name}: not committed, so the version would lack it"):
        publish.publish(publisher.root)
    assert publisher.tags() == []


def test_a_data_remote_that_dvc_does_not_know_is_named_with_those_that_it_does(publisher: Clone) -> None:
    publisher.set("publish", "data_remote", "nowhere")
    publisher.commit()
    publisher.run()
    told = r"^params\.yaml: publish\.data_remote: DVC has no remote 'nowhere'; there are shelf \(`dvc remote add`\)\.$"
    with pytest.raises(UserMistake, match=told):
        publish.publish(publisher.root)
    assert publisher.tags() == []


def test_a_data_remote_that_is_gone_keeps_everything_before(publisher: Clone) -> None:
    shutil.rmtree(publisher.shelf, ignore_errors=True)
    # A file where the folder should be, which is there the next time too.
    publisher.shelf.write_text("")
    told: list[str] = []
    with pytest.raises(UserMistake, match=r"^DVC: .*Not a directory: .*no file in its way"):
        publish.publish(publisher.root, told.append)
    assert told == []
    publisher.shelf.unlink()
    publisher.shelf.symlink_to("not mounted")
    log = publisher.root / ".overnight/logs/a-run/publish.log"
    with pytest.raises(TryAgain, match="What was done until here is kept; `overnight publish` goes on") as caught:
        publish.publish(publisher.root, told.append, log)
    assert "\n" not in str(caught.value)
    assert len(told) == 1
    assert "ERROR" in log.read_text()
    assert publisher.tags() == []
    assert registry.versions(publisher.root) == ()
    publisher.shelf.unlink()
    assert publish.publish(publisher.root).promoted
    publisher.check_remote()


def test_by_hand_it_is_for_when_a_run_at_work_has_ended(publisher: Clone) -> None:
    nobody = Console(file=io.StringIO())
    told = r"run a-run .*\. `overnight publish` when it has ended\.$"
    with lock.hold(publisher.root, "a-run"), pytest.raises(lock.Held, match=told):
        publish.publish_by_hand(nobody, nobody)


def test_by_hand_what_a_killed_run_has_left_at_work_is_waited_for_and_told(
    publisher: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_SECONDS_UNTOLD", 0.0)
    leave_lock(publisher.root, seconds=1.0)
    err = io.StringIO()
    assert publish.publish_by_hand(Console(file=io.StringIO()), Console(file=err, width=200)) == 0
    assert err.getvalue().startswith("what was at work here has ended, ")


def test_by_hand_a_version_is_made_on_a_branch(publisher: Clone) -> None:
    git(publisher.root, "checkout", "--quiet", "--detach")
    console = Console(file=io.StringIO())
    with pytest.raises(UserMistake, match="HEAD is on no branch: the version's commit would go onto 'nightly'"):
        publish.publish_by_hand(console, console)
    assert publisher.tags() == []
    git(publisher.root, "switch", "--quiet", "main")
    assert publish.publish_by_hand(console, console) == 0
    # What is a version needs no commit.
    git(publisher.root, "checkout", "--quiet", "--detach")
    assert publish.publish_by_hand(console, console) == 0
    # A night's worktree is on no branch, and a person may finish what it has begun.
    night = worktree.add(publisher.root, "night", "HEAD")
    publish._check_branch(night, project.parameters(publisher.root))


def test_what_a_run_took_that_made_nothing_new_is_put_back(published: Clone) -> None:
    speed = published.root / "speed/train.csv"
    speed.parent.mkdir()
    speed.write_text("as of the version\n")
    published.commit("Speed")
    speed.write_text("as of a repetition\n")
    told: list[str] = []
    assert publish.publish(published.root, told.append).reasons[0] == "nothing new since v1.1.0"
    assert told == ["speed/ is put back as it is in Git; .overnight/measurements/ has what this run took."]
    assert publish.publish(published.root, told.append).reasons[0] == "nothing new since v1.1.0"
    assert len(told) == 1
    # Else the next pull of a version that others have published would stop at it.
    assert speed.read_text() == "as of the version\n"


def test_a_git_remote_that_is_gone_keeps_everything_before(publisher: Clone) -> None:
    away = publisher.shared.with_name("away.git")
    publisher.shared.rename(away)
    with pytest.raises(TryAgain, match="does not appear to be a git repository"):
        publish.publish(publisher.root)
    away.rename(publisher.shared)
    assert publish.publish(publisher.root).promoted


def test_an_unknown_remote_is_named(publisher: Clone) -> None:
    publisher.set("publish", "git_remote", "upstream")
    with pytest.raises(UserMistake, match="Git has no remote 'upstream'; there are origin"):
        publish.publish(publisher.root)


def test_a_remote_that_comes_back_gets_the_version(publisher: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher.shelf.symlink_to("not mounted")
    publisher.set("publish", "retries", 2)
    publisher.set("flow", "retry_delay_seconds", 8.0)
    publisher.commit()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            publisher.shelf.unlink()

    monkeypatch.setattr(publish, "time", SimpleNamespace(sleep=wait))
    told: list[str] = []
    assert publish.publish(publisher.root, told.append).promoted
    assert [line.rpartition(". ")[2] for line in told] == ["Trying again in 8 s.", "Trying again in 16 s."]
    assert waits == [8.0, 16.0]
    publisher.check_remote()


def test_a_push_that_the_remote_refuses_for_good_is_told(publisher: Clone) -> None:
    hook = publisher.shared / "hooks/update"
    hook.write_text("#!/bin/sh\necho asked >> asked\nexit 1\n")
    hook.chmod(0o755)
    told: list[str] = []
    with pytest.raises(UserMistake, match=r"git push --quiet failed .*hook declined.* It will refuse it again"):
        publish.publish(publisher.root, told.append)
    # Nobody waits, and it is asked once.
    assert told == []
    assert (publisher.shared / "asked").read_text() == "asked\n"
    assert publisher.tags() == []
    with pytest.raises(GitFailed):
        commit_of(publisher.shared, "nightly")
