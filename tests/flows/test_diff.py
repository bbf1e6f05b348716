"""What differs between two versions, found without a checkout."""

import io
import json
import re
import shutil
from pathlib import PurePosixPath

import pytest
from publishing import Clone
from rich.console import Console

from flows import diff, registry
from flows.diff import Change, Files
from flows.git import commit_of, git
from tasks.errors import UserMistake


def shown(first: str, second: str) -> dict[str, list[str]]:
    """The lines of each section."""
    out = io.StringIO()
    assert diff.diff(first, second, Console(file=out, width=80), Console(file=io.StringIO())) == 0
    sections: dict[str, list[str]] = {}
    heading = ""
    for line in out.getvalue().splitlines():
        if line.startswith("  "):
            sections[heading].append(line[2:])
        else:
            heading = line
            sections[heading] = []
    return sections


def test_two_versions(published: Clone) -> None:
    # A third version, made by other code on another machine.
    (published.root / "data/raw/a.txt").write_text("Changed.\n")
    (published.root / "data/raw/b.txt").unlink()
    with (published.root / "stage.py").open("a") as file:
        file.write("# one line\n")
    published.run()
    facts = json.loads((published.root / "environment.json").read_text())
    (published.root / "environment.json").write_text(json.dumps({**facts, "python": "3.11.0"}))
    third = published.commit()

    sections = shown("v1.1.0", "HEAD")
    assert sections["parameters"] == ["none"]
    assert sections["data"] == ["data/raw: 1 removed, 1 changed", "- b.txt", "~ a.txt"]
    assert sections["code"] == ["stage.py | 1 +", "1 file changed, 1 insertion(+)"]
    assert sections["environment"] == [f"python: {facts['python']} -> 3.11.0"]
    assert sections["metrics"] == ["none"]

    sections = shown("v1.0.0", "lm@v1.1.0")
    assert sections["parameters"] == ["train.learning_rate: 0.25 -> 0.75"]
    assert sections["data"] == ["data/raw: 1 added", "+ b.txt"]
    assert sections["code"] == ["none"]
    assert sections["environment"] == ["none"]
    assert "evaluation.gate.passed: True -> False" in sections["metrics"]
    assert "evaluation.models.int8.bits_per_byte.value: 0.25 -> 0.75" in sections["metrics"]
    assert "evaluation.against: null -> lm@v1.0.0" in sections["metrics"]
    # Nothing was checked out.
    assert commit_of(published.root, "HEAD") == third
    assert git(published.root, "status", "--porcelain") == ""


def test_of_a_list_only_what_differs_is_told(published: Clone) -> None:
    params = published.root / "params.yaml"
    params.write_text(params.read_text() + "extra:\n- {name: notes, uri: texts}\n- {name: talk, uri: a}\n")
    before = published.commit()
    params.write_text(params.read_text().replace("uri: a", "uri: b"))
    after = published.commit()
    assert diff.compare(published.root, before, after).parameters == (Change("extra[1].uri", "a", "b"),)


def test_any_revision_will_do(published: Clone) -> None:
    first = git(published.root, "rev-list", "--max-parents=0", "HEAD")
    sections = shown(first, "prod")
    assert sections["data"] == ["data/raw: 1 added", "+ a.txt"]
    told = f"{first}: no results of a run are committed there; `overnight versions` lists what has some"
    assert sections["metrics"] == [told]
    assert shown(first, first)["metrics"] == ["none"]


def test_an_unknown_name_is_told(published: Clone) -> None:
    with pytest.raises(UserMistake, match=r"no version 'v9'; there are .* Git knows no revision of that name"):
        diff.diff("v9", "v1.0.0", Console(), Console(file=io.StringIO()))


def test_a_version_that_git_s_remote_alone_knows_is_found(published: Clone) -> None:
    git(published.root, "tag", "-d", "lm@v1.1.0")
    assert shown("v1.0.0", "latest")["parameters"] == ["train.learning_rate: 0.25 -> 0.75"]
    # One that does not answer is no reason not to compare what is known.
    git(published.root, "remote", "set-url", "origin", "nowhere")
    err = io.StringIO()
    assert diff.diff("v1.0.0", "v1.1.0", Console(file=io.StringIO()), Console(file=err)) == 0
    assert re.search(r"[^.]\. What is known here is taken\.\n$", err.getvalue())
    published.set("publish", "git_remote", "orign")
    err = io.StringIO()
    assert diff.diff("v1.0.0", "v1.1.0", Console(file=io.StringIO()), Console(file=err)) == 0
    told = "params.yaml: publish.git_remote: Git has no remote 'orign'; there are origin (`git remote add`). What is"
    assert err.getvalue().startswith(told)


@pytest.mark.parametrize("content", ["{", None])
def test_an_environment_that_cannot_be_read_is_not_known(published: Clone, content: str | None) -> None:
    file = published.root / "environment.json"
    file.unlink() if content is None else file.write_text(content)
    published.commit()
    told = "not known: environment.json is not there, or cannot be read, on one side or both"
    assert shown("v1.1.0", "HEAD")["environment"] == [told]


def test_a_list_of_files_that_is_lost_everywhere(published: Clone) -> None:
    shutil.rmtree(published.root / ".dvc/cache")
    sections = shown("v1.0.0", "v1.1.0")
    assert sections["data"] == ["data/raw: 1 added", "+ b.txt"]
    shutil.rmtree(published.shelf)
    err = Console(file=io.StringIO(), width=400)
    diff.diff("v1.0.0", "v1.1.0", Console(file=io.StringIO()), err)
    why = "is not in DVC's cache, nor at the remote 'shelf', which has nothing at all: look whether it is mounted"
    assert why in err.file.getvalue()  # type: ignore[attr-defined]
    sections = shown("v1.0.0", "v1.1.0")
    assert sections["data"][0].startswith("not known: a list of files is neither in DVC's cache nor at its remote")
    assert sections["parameters"] == ["train.learning_rate: 0.25 -> 0.75"]
    assert shown("v1.0.0", "v1.0.0")["metrics"] == ["none"]
    # Two that nobody can read are not the same.
    (told,) = sections["metrics"]
    assert told == "evaluation: not in DVC's cache nor at its remote -> not in DVC's cache nor at its remote"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, ()),
        ({"a": 1}, {"a": 1}, ()),
        ({"a": 1, "b": None}, {"b": 0.5, "c": "x"}, (("a", "1", "-"), ("b", "null", "0.5"), ("c", "-", "x"))),
        ({"a": [1]}, {"a": [1, 2]}, (("a", "[1]", "[1, 2]"),)),
        # What differs is not shown alike.
        ({"a": 4.123456}, {"a": 4.123458}, (("a", "4.123456", "4.123458"),)),
    ],
)
def test_differing_values(
    before: dict[str, object], after: dict[str, object], expected: tuple[tuple[str, str, str], ...]
) -> None:
    assert diff.differing(before, after) == tuple(Change(*change) for change in expected)


def test_differing_files() -> None:
    before = {PurePosixPath("a"): "1", PurePosixPath("b"): "2", PurePosixPath("c"): "3"}
    after = {PurePosixPath("b"): "2", PurePosixPath("c"): "4", PurePosixPath("d/e"): "1"}
    found = diff.differing_files(before, after)
    assert found == Files(("d/e",), ("a",), ("c",))
    assert str(found) == "1 added, 1 removed, 1 changed"
    assert str(Files()) == "the same files"


def test_a_champion_is_a_name_too(published: Clone) -> None:
    version = registry.resolve(published.root, "prod")
    assert diff.resolve(published.root, "prod") == diff.resolve(published.root, version.commit[:9]) == version.commit
