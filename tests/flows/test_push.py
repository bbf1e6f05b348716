"""Versions that were made before there was a remote."""

import io
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from publishing import Clone
from rich.console import Console

from flows import contents, dvc, project, push, registry, remotely
from flows.git import git
from flows.registry import NoSuchVersion
from tasks.errors import TryAgain, UserMistake

BEHIND = (
    "origin lacks commits of your branch main, and with them what a clone knows of remotes: `git push` brings them.\n"
)


def said(*names: str, verify: bool = False) -> tuple[int, str, str]:
    out, err = (Console(file=io.StringIO(), width=80) for _ in range(2))
    code = push.push(names, out, err, verify)
    return code, out.file.getvalue(), err.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def late(published: Clone) -> Clone:
    """Two versions, and remotes that hold nothing of them."""
    shutil.rmtree(published.shared)
    shutil.rmtree(published.shelf)
    git(published.root, "init", "-q", "--bare", "-b", "main", str(published.shared))
    return published


def test_all_that_a_remote_lacks_is_brought_there(late: Clone) -> None:
    assert said() == (0, "v1.0.0 is at shelf and origin.\nv1.1.0 is at shelf and origin.\n", BEHIND)
    assert late.tags() == ["lm#prod#1", "lm@v1.0.0", "lm@v1.1.0"]
    late.check_remote()
    before = {file: file.stat().st_mtime_ns for file in late.shelf.rglob("*")}
    git(late.root, "push", "-q", "origin", "main")
    code, _, err = said()
    assert (code, err) == (0, "")
    # Both have gone on.
    other = late.clone("other")
    (other.root / "NOTES").write_text("theirs")
    other.commit("Theirs")
    git(other.root, "push", "-q", "origin", "main")
    late.commit_empty()
    assert said()[2] == BEHIND
    assert {file: file.stat().st_mtime_ns for file in late.shelf.rglob("*")} == before


def test_where_there_is_no_version_nothing_is_brought_and_that_is_told(publisher: Clone) -> None:
    told = "no version yet; `overnight publish` makes the first of what the last run made.\n"
    assert said() == (0, "", told)


def test_one_is_brought_alone_and_one_that_is_unknown_is_named(late: Clone) -> None:
    assert said("v1.0.0")[1] == "v1.0.0 is at shelf and origin.\n"
    assert late.tags() == ["lm#prod#1", "lm@v1.0.0"]
    with pytest.raises(NoSuchVersion):
        said("v7")


def test_what_is_damaged_in_the_cache_is_not_brought_as_it_is(late: Clone) -> None:
    model = late.root / "models/int8/model.onnx"
    with dvc.store(late.root) as store:
        md5 = contents.md5_of(model)
        store.path(md5).chmod(0o644)
        store.path(md5).write_bytes(b"")
        assert said("v1.1.0")[0] == 0
        assert store.download(md5, late.root / ".overnight/fetched")
    assert (late.root / ".overnight/fetched").read_bytes() == model.read_bytes()


def test_what_is_cut_off_at_the_remote_is_brought_anew(published: Clone) -> None:
    md5 = contents.md5_of(published.root / "models/int8/model.onnx")
    held = published.shelf / "files/md5" / md5[:2] / md5[2:]
    held.chmod(0o644)
    held.write_bytes(b"cut")
    assert said("v1.1.0")[0] == 0
    assert contents.md5_of(held) == md5


def test_what_is_cut_off_at_the_remote_and_damaged_here_is_not_taken_for_whole(published: Clone) -> None:
    model = published.root / "models/int8/model.onnx"
    md5 = contents.md5_of(model)
    with dvc.store(published.root) as store:
        for held, left in ((published.shelf / "files/md5" / md5[:2] / md5[2:], b"cut"), (store.path(md5), b"")):
            held.chmod(0o644)
            held.write_bytes(left)
    model.unlink()
    code, out, err = said("v1.1.0")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: v1.1.0: DVC's remote 'shelf' lacks 1 of the version's objects ({md5})")


def test_where_bytes_of_one_are_lost_the_others_are_brought(late: Clone) -> None:
    model = contents.recorded(late.root, registry.resolve(late.root, "v1.0.0").commit)[-1].md5
    with dvc.store(late.root) as store:
        store.discard({model})
    code, out, err = said()
    assert (code, out) == (1, "v1.1.0 is at shelf and origin.\n")
    assert err.startswith("error: v1.0.0: DVC's remote 'shelf' lacks 1 of the version's objects")
    # A tag would name bytes that nobody has.
    assert late.tags() == ["lm@v1.1.0"]


@pytest.mark.parametrize("verify", [False, True])
def test_a_remote_that_has_nothing_at_all_may_be_the_wrong_one(late: Clone, verify: bool) -> None:
    shutil.rmtree(late.root / ".dvc/cache")
    told = "nor at the remote 'shelf', which has nothing at all: look whether it is mounted, and the right one. "
    assert told in said("v1.0.0", verify=verify)[2]


def test_without_any_remote_there_is_nowhere_to_push_to(late: Clone) -> None:
    git_remote = project.parameters(late.root).publish.git_remote
    late.set("publish", "git_remote", None)
    assert said("v1.0.0")[1] == "v1.0.0 is at shelf.\n"
    (late.root / ".dvc/config").write_text("")
    with pytest.raises(UserMistake, match="there is no remote to push to: `dvc remote add"):
        said()
    late.set("publish", "git_remote", git_remote)
    with pytest.raises(UserMistake, match=r"^--verify: no DVC remote is configured"):
        said(verify=True)


def test_a_remote_of_git_that_does_not_answer_is_waited_for(late: Clone) -> None:
    git(late.root, "remote", "set-url", "origin", "nowhere")
    with pytest.raises(TryAgain, match="the Git remote 'origin', which decides, does not answer"):
        said()


def spoil(file: Path) -> bytes:
    """Other bytes of the same size; returns those that were there."""
    good = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(good[:-1] + b"?")
    file.chmod(0o444)
    return good


def test_what_is_damaged_at_the_remote_is_read_back_and_mended(published: Clone) -> None:
    md5 = contents.md5_of(published.root / "models/int8/model.onnx")
    held = published.shelf / "files/md5" / md5[:2] / md5[2:]
    good = spoil(held)
    assert said("v1.1.0")[:2] == (0, "v1.1.0 is at shelf and origin.\n")
    # The copy in the project will do.
    with dvc.store(published.root) as store:
        store.discard({md5})
    code, out, err = said("v1.1.0", verify=True)
    assert (code, out) == (0, "v1.1.0 is at shelf and origin.\n")
    assert "models/int8/model.onnx: was damaged at DVC's remote 'shelf'; uploaded anew" in err
    assert held.read_bytes() == good
    assert "damaged" not in said(verify=True)[2]


def test_what_is_damaged_at_both_is_named_and_the_other_versions_are_read(published: Clone) -> None:
    model = contents.recorded(published.root, registry.resolve(published.root, "v1.0.0").commit)[-1].md5
    spoil(published.shelf / "files/md5" / model[:2] / model[2:])
    with dvc.store(published.root) as store:
        spoil(store.path(model))
    code, out, err = said(verify=True)
    assert (code, out) == (1, "v1.1.0 is at shelf and origin.\n")
    told = "v1.0.0: damaged at DVC's remote 'shelf', with no good copy in DVC's cache nor in the project: models/"
    assert told in err
    assert "`overnight push --verify v1.0.0` on a machine that has them" in err


def test_a_remote_that_refuses_has_lost_nothing(late: Clone) -> None:
    refusal = "DVC's remote 'shelf' refuses: Forbidden."
    refused = patch.object(remotely, "_ask", side_effect=UserMistake(refusal))
    with refused, pytest.raises(UserMistake, match=f"^{re.escape(refusal)}$"):
        said()


def test_a_tag_that_git_s_remote_declines_keeps_no_other_version_back(late: Clone) -> None:
    hook = late.shared / "hooks/update"
    hook.write_text('#!/bin/sh\n[ "$1" != refs/tags/lm@v1.0.0 ]\n')
    hook.chmod(0o755)
    code, out, err = said()
    assert (code, out) == (1, "v1.1.0 is at shelf and origin.\n")
    assert err.startswith("error: git push --quiet failed")
