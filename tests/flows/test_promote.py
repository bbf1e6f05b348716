"""Which version is in production, by hand."""

import io

import pytest
from publishing import Clone
from rich.console import Console

from flows import promote, registry
from flows.git import git
from flows.registry import NoSuchVersion
from tasks.errors import TryAgain, UserMistake


def said(action: str, *arguments: str) -> tuple[str, str]:
    out, err = (Console(file=io.StringIO(), width=80) for _ in range(2))
    code = promote.promote(*arguments, out, err) if action == "promote" else promote.rollback(out)
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


def test_what_is_on_this_machine_alone_is_not_put_into_production_for_all(published: Clone) -> None:
    git(published.shared, "tag", "-d", "lm@v1.1.0")
    with pytest.raises(UserMistake, match=r"^v1.1.0 is not at origin: .* `git push origin lm@v1.1.0` bring it there"):
        said("promote", "v1.1.0")
    assert champion(published) == "v1.0.0"
    assert published.tags() == ["lm#prod#1", "lm@v1.0.0"]


def test_the_remote_decides_so_it_has_to_answer(published: Clone) -> None:
    git(published.root, "remote", "set-url", "origin", "nowhere")
    with pytest.raises(TryAgain, match="the Git remote 'origin', which decides, does not answer"):
        said("promote", "v1.1.0")
    assert [version.stages for version in registry.versions(published.root)] == [("prod",), ()]
