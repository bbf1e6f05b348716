"""Which version is in production, by hand."""

import io
import shutil
from unittest.mock import patch

import pytest
from publishing import Clone
from rich.console import Console

from flows import contents, dvc, generate, objects, promote, pushed, registry, remotely
from flows.git import git
from flows.registry import NoSuchVersion
from tasks.champion import MODEL_FILES
from tasks.errors import TryAgain, UserMistake


def said(action: str, *arguments: str) -> tuple[str, str]:
    out, err = (Console(file=io.StringIO(), width=80) for _ in range(2))
    code = promote.promote(*arguments, out, err) if action == "promote" else promote.rollback(out, err)
    assert code == 0
    return out.file.getvalue(), err.file.getvalue()  # type: ignore[attr-defined]


def champion(published: Clone) -> str:
    """The champion as the Git remote has it."""
    found = registry.champion(published.shared)
    assert found is not None
    return found.name


def test_a_person_may_promote_what_the_gate_refused(published: Clone) -> None:
    out, err = said("promote", "latest")
    assert out == "v1.1.0 is in production, at origin too.\n"
    assert err == "v1.1.0: Refused by the gate: a loss of 0.75. It is promoted because you ask for it.\n"
    assert champion(published) == "v1.1.0"
    assert said("promote", "v1.1.0")[0] == "v1.1.0 is in production already.\n"


def test_rolling_back_goes_back_one_version_each_time(published: Clone) -> None:
    third = registry.register(published.root, published.commit_empty(), "The gate passed.", "origin")
    said("promote", "v1.1.0")
    said("promote", third.name)
    assert said("rollback")[0] == "v1.1.0 is in production, at origin too.\n"
    assert (
        git(published.root, "tag", "--list", "-n1", "lm#prod#4").split("lm#prod#4")[1].strip()
        == "Rolled back from v1.2.0."
    )
    assert said("rollback")[0] == "v1.0.0 is in production, at origin too.\n"
    assert champion(published) == "v1.0.0"
    with pytest.raises(
        UserMistake, match=r"v1.0.0 is the first version that was in production; there is none before it"
    ):
        said("rollback")
    # No byte was moved, no commit made.
    assert len(registry.versions(published.root)) == 3


def test_there_is_nothing_to_roll_back(publisher: Clone) -> None:
    with pytest.raises(UserMistake, match="no version is in production"):
        said("rollback")


def test_an_unknown_version(published: Clone) -> None:
    with pytest.raises(NoSuchVersion, match=r"there are v1.0.0, v1.1.0"):
        said("promote", "v3")


def test_what_was_on_this_machine_alone_is_brought_before_it_is_in_production(published: Clone) -> None:
    git(published.shared, "tag", "-d", "lm@v1.1.0")
    shutil.rmtree(published.shelf)
    published.shelf.mkdir()
    assert said("promote", "v1.1.0")[0] == "v1.1.0 is in production, at origin too.\n"
    assert published.tags() == ["lm#prod#1", "lm#prod#2", "lm@v1.0.0", "lm@v1.1.0"]
    with dvc.store(published.root) as store:
        for version, lacks in {"v1.1.0": False, "v1.0.0": True}.items():
            outputs = contents.recorded(published.root, registry.resolve(published.root, version).commit)
            assert bool(store.lacking(objects.needed(store, outputs, {}))) is lacks


@pytest.mark.parametrize("lost", ["a file", "a listing"])
def test_what_is_lost_is_not_put_into_production(lost: str, published: Clone) -> None:
    outputs = contents.recorded(published.root, registry.resolve(published.root, "v1.1.0").commit)
    file, listing = outputs[-1], next(output.md5 for output in outputs if output.is_folder)
    gone = listing if lost == "a listing" else file.md5
    with dvc.store(published.root) as store:
        store.discard({gone})
    # Else it would be taken from there.
    (published.root / file.path).unlink()
    next(published.shelf.rglob(f"{gone[:2]}/{gone[2:]}")).unlink()
    with pytest.raises(UserMistake, match=r"^v1\.1\.0: .*`overnight push v1\.1\.0` on a machine that has them"):
        said("promote", "v1.1.0")
    assert champion(published) == "v1.0.0"
    # What is in production stays there; nothing has to be looked for.
    assert "lm#prod#2" not in published.tags()


def test_the_model_in_production_is_had_on_another_machine(published: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    other = published.clone("other")
    monkeypatch.chdir(other.root)
    told: list[str] = []
    folder = generate.place(other.root, told.append, "prod")
    assert folder == other.root / ".overnight/versions/v1.0.0/models/int8"
    assert "0.75" not in (folder / "config.json").read_text()
    # What its fine-tuning began with is not brought along.
    assert {path.name for path in folder.iterdir()} == {*MODEL_FILES}
    monkeypatch.chdir(published.root)
    said("promote", "v1.1.0")
    monkeypatch.chdir(other.root)
    # Whoever promotes elsewhere need not tell anybody here.
    folder = generate.place(other.root, told.append, "prod")
    assert "0.75" in (folder / "config.json").read_text()
    # What was spoilt here is mended.
    (folder / "model.onnx").write_text("spoilt")
    assert "0.75" in (generate.place(other.root, told.append, "v1.1.0") / "model.onnx").read_text()
    assert told == []
    git(other.root, "remote", "set-url", "origin", "nowhere")
    assert generate.place(other.root, told.append, "prod") == folder
    assert told[0].endswith("What is known here is taken.")
    with pytest.raises(NoSuchVersion):
        generate.place(other.root, told.append, "v9")


def test_a_model_that_is_lost_is_told_by_its_file(published: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(published.shelf)
    published.shelf.mkdir()
    other = published.clone("other")
    monkeypatch.chdir(other.root)
    with pytest.raises(UserMistake, match=r"^v1\.0\.0: models/int8/.*: missing in DVC's cache, and no good copy"):
        generate.place(other.root, print, "prod")


def test_rolling_back_does_not_wait_for_the_data(published: Clone) -> None:
    said("promote", "v1.1.0")
    shutil.rmtree(published.shelf)
    published.shelf.symlink_to("not mounted")
    out, err = said("rollback")
    assert out == "v1.0.0 is in production, at origin too.\n"
    assert err.endswith("Whether all of v1.0.0 is there was not asked; `overnight push v1.0.0` does.\n")
    with pytest.raises(TryAgain, match="'shelf' does not answer"):
        said("promote", "v1.1.0")


def test_rolling_back_does_not_wait_for_a_remote_that_refuses(published: Clone) -> None:
    said("promote", "v1.1.0")
    with patch.object(remotely, "_ask", side_effect=UserMistake("DVC's remote 'shelf' refuses: Forbidden.")):
        out, err = said("rollback")
    assert out == "v1.0.0 is in production, at origin too.\n"
    assert err.endswith("Whether all of v1.0.0 is there was not asked; `overnight push v1.0.0` does.\n")


def test_without_a_remote_of_data_what_the_cache_lacks_is_not_put_into_production(published: Clone) -> None:
    (published.root / ".dvc/config").write_text("")
    assert said("promote", "v1.1.0")[0] == "v1.1.0 is in production, at origin too.\n"
    shutil.rmtree(published.root / ".dvc/cache")
    with pytest.raises(UserMistake, match=r"^v1\.0\.0: its bytes are not in DVC's cache, and there is no remote"):
        said("promote", "v1.0.0")


def test_a_remote_that_has_nothing_of_what_was_pushed_to_it_is_told(published: Clone) -> None:
    pushed.remember(published.root, None, registry.resolve(published.root, "v1.1.0"))
    shutil.rmtree(published.shelf)
    with pytest.raises(TryAgain, match=r"has nothing of v1\.1\.0, which was pushed to that"):
        said("promote", "v1.1.0")
    assert not published.shelf.exists()


def test_a_remote_of_git_that_is_not_there_is_told_by_its_name(published: Clone) -> None:
    published.set("publish", "git_remote", "orign")
    with pytest.raises(UserMistake, match=r"publish\.git_remote: Git has no remote 'orign'; there are origin"):
        said("promote", "v1.1.0")


def test_rolling_back_does_not_need_all_bytes(published: Clone) -> None:
    said("promote", "v1.1.0")
    first = contents.recorded(published.root, registry.resolve(published.root, "v1.0.0").commit)
    text = next(output.md5 for output in first if str(output.path) == "data/raw")
    with dvc.store(published.root) as store:
        store.discard({text})
    next(published.shelf.rglob(f"{text[:2]}/{text[2:]}")).unlink()
    out, err = said("rollback")
    assert out == "v1.0.0 is in production, at origin too.\n"
    assert err.startswith("v1.0.0: data/raw (")


def test_the_remote_decides_so_it_has_to_answer(published: Clone) -> None:
    git(published.root, "remote", "set-url", "origin", "nowhere")
    with pytest.raises(TryAgain, match="the Git remote 'origin', which decides, does not answer"):
        said("promote", "v1.1.0")
    assert [version.stages for version in registry.versions(published.root)] == [("prod",), ()]
