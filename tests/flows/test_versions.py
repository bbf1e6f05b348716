"""What there is to know of each version at a glance."""

import io
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from publishing import Clone
from rich.console import Console

from flows import registry, versions
from flows.git import commit_of, git
from flows.versions import Row


def listed(*, last: int | None = None, terminal: bool = False) -> tuple[list[str], str]:
    out, err = io.StringIO(), io.StringIO()
    consoles = [Console(file=file, force_terminal=terminal, width=160, color_system=None) for file in (out, err)]
    assert versions.versions(last, *consoles) == 0
    return out.getvalue().splitlines(), err.getvalue()


def test_each_version_on_a_line_the_newest_first(published: Clone) -> None:
    (title, second, first), err = listed()
    assert title.split("  ")[0] == "version"
    assert err == ""
    newest, oldest = registry.versions(published.root)[::-1]
    assert second.split()[0] == "v1.1.0"
    assert " ".join(second.split()[1:3]) == f"{newest.at.astimezone():%Y-%m-%d %H:%M}"
    assert [newest.commit[:7], "0.750", "refused", "-"] == second.split()[4:8]
    assert [oldest.commit[:7], "0.250", "passed", "prod"] == first.split()[4:8]
    # The data of the two differs, and size is that of all outputs.
    assert second.split()[3] != first.split()[3]
    files = [
        path for folder in ("data/raw", "models") for path in (published.root / folder).rglob("*") if path.is_file()
    ]
    size = sum(path.stat().st_size for path in files if path.suffix not in (".dvc",) and path.name != ".gitignore")
    assert second.endswith(versions.describe_size(size))


def test_a_table_on_a_terminal(published: Clone) -> None:
    (title, *rows), _ = listed(terminal=True)
    assert title.split()[:4] == ["version", "date", "data", "commit"]
    assert len(rows) == 2


def test_the_last_ones_and_how_many_are_left_out(published: Clone) -> None:
    lines, err = listed(last=1)
    assert [line.split()[0] for line in lines] == ["version", "v1.1.0"]
    assert err == "and 1 older ones (`overnight versions --all`).\n"


def test_what_the_cache_has_lost_comes_from_the_remote(published: Clone) -> None:
    whole = listed()
    shutil.rmtree(published.root / ".dvc/cache")
    assert listed() == whole
    shutil.rmtree(published.shelf)
    lines, err = listed()
    # The verdict stands in the tag.
    assert [line.split()[5:7] for line in lines[1:]] == [["-", "refused"], ["-", "passed"]]
    assert err.startswith("the measurements of 2 of them cannot be had: models/evaluation.json (")
    assert err.endswith(
        "nor at the remote 'shelf', which has nothing at all: look whether it is mounted, and the right one.\n"
    )


def test_another_machine_s_versions_are_seen_and_without_it_those_that_are_known(published: Clone) -> None:
    other = published.clone("other")
    registry.promote(other.root, registry.resolve(other.root, "v1.1.0"), "-", "origin")
    assert "prod" in listed()[0][1].split()
    git(published.root, "remote", "set-url", "origin", "nowhere")
    lines, err = listed()
    assert len(lines) == 3
    assert err.startswith("showing what is known here: git fetch --quiet failed")
    git(published.root, "remote", "rename", "origin", "other")
    lines, err = listed()
    assert len(lines) == 3
    assert err.startswith("showing what is known here: params.yaml: publish.git_remote: Git has no remote 'origin'")


def test_a_tag_on_a_commit_without_a_pipeline(published: Clone) -> None:
    registry.register(published.root, commit_of(published.root, "HEAD~3"), "by hand")
    assert listed()[0][1].split()[3:] == ["-", commit_of(published.root, "HEAD~3")[:7], "-", "-", "-", "-"]


def test_none_yet(publisher: Clone) -> None:
    assert listed() == ([], "no version yet; `overnight publish` makes the first of what the last run made.\n")


def test_plain_git_and_gto_and_dvc_show_them(published: Clone) -> None:
    def said(program: str, *arguments: str) -> str:
        command = [Path(sys.executable).with_name(program), *arguments]
        return subprocess.run(command, cwd=published.root, capture_output=True, text=True, check=True).stdout

    assert git(published.root, "tag").split() == ["lm#prod#1", "lm@v1.0.0", "lm@v1.1.0"]
    assert "Refused by the gate: a loss of 0.75" in git(published.root, "tag", "-n1", "lm@v1.1.0")
    shown = said("gto", "show", "lm")
    assert [row.split("│")[2].strip() for row in shown.splitlines() if "lm@" in row] == ["v1.1.0", "v1.0.0"]
    assert [row.split("│")[3].strip() for row in shown.splitlines() if "lm@" in row] == ["", "prod"]
    metrics = said("dvc", "metrics", "diff", "lm@v1.0.0", "lm@v1.1.0")
    assert "models.int8.bits_per_byte.value" in metrics


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1024, "1.0 KiB"), (1536 * 1024, "1.5 MiB"), (2**50, "1,024.0 TiB")],
)
def test_sizes(size: int, text: str) -> None:
    assert versions.describe_size(size) == text


def test_what_is_not_known_is_a_dash() -> None:
    row = Row("v1.0.0", datetime(2026, 1, 2, tzinfo=UTC), "abcdef0123", ())
    assert row.cells[2:] == ("-", "abcdef0", "-", "-", "-", "-")
