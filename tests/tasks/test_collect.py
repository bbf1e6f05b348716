"""Collecting: what is copied, what is left alone, and what is refused."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tasks.collect.collect import CollectReport, collect
from tasks.errors import BadInput
from tasks.sources import CollectParams

REPOSITORY = Path(__file__).parents[2]


def params(uri: str, format_: str = "txt", name: str = "notes") -> CollectParams:
    tabular = format_ in ("jsonl", "csv", "parquet")
    source = {"name": name, "uri": uri, "format": format_, "licence": "CC0-1.0"}
    return CollectParams.model_validate({"sources": [source | ({"text_field": "text"} if tabular else {})]})


def write(path: Path, content: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def counts(report: CollectReport) -> tuple[int, int, int, int]:
    source = report.sources[0]
    return source.new, source.changed, source.unchanged, source.kept


def collected(project: Path) -> dict[str, str]:
    folder = project / "data/raw/notes"
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


TREE = ["a.txt", "b.txt.gz", "c.md", "sub/d.txt.zst", "sub/deep/e.txt", ".hidden.txt", "sub/f.txt.bak"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("in", {"a.txt", "b.txt.gz", "sub/d.txt.zst", "sub/deep/e.txt"}),
        ("in/*.txt", {"a.txt"}),
        ("in/**/*", {"a.txt", "b.txt.gz", "sub/d.txt.zst", "sub/deep/e.txt"}),
        ("in/s*/*", {"sub/d.txt.zst"}),
        ("in/c.md", {"c.md"}),
        ("in/sub/f.txt.bak", {"f.txt.bak"}),
    ],
)
def test_a_uri_means_these_files(project: Path, uri: str, expected: set[str]) -> None:
    for name in TREE:
        write(project / "in" / name, name)
    collect(params(uri), project)
    assert set(collected(project)) == expected


def test_a_file_whose_name_holds_glob_characters_is_that_file(project: Path) -> None:
    write(project / "in/notes [1].txt")
    collect(params("in/notes [1].txt"), project)
    assert set(collected(project)) == {"notes [1].txt"}


def test_a_file_of_an_installed_package_is_copied_without_importing_the_package(project: Path) -> None:
    code = (
        "import sys; from tests_params import p; from tasks.collect.collect import collect; from pathlib import Path;"
        "collect(p, Path()); sys.exit('bible' in sys.modules)"
    )
    write(
        project / "tests_params.py",
        "from tasks.sources import CollectParams\n"
        "p = CollectParams.model_validate({'sources': [{'name': 'kjv', 'uri': 'package://bible/data/kjv.jsonl',\n"
        "    'format': 'jsonl', 'licence': 'public domain', 'text_field': 'text'}]})\n",
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{project}"}
    subprocess.run([sys.executable, "-c", code], cwd=project, env=environment, check=True)
    assert (project / "data/raw/kjv/kjv.jsonl").stat().st_size > 1_000_000


def test_only_what_is_new_or_changed_is_copied_and_what_has_gone_is_kept(project: Path) -> None:
    for name in ("same.txt", "longer.txt", "equally long.txt", "gone.txt"):
        write(project / "in" / name, "before")
    assert counts(collect(params("in"), project)) == (4, 0, 0, 0)
    write(project / "in/longer.txt", "before and after")
    write(project / "in/equally long.txt", "behind")
    write(project / "in/new.txt", "new")
    (project / "in/gone.txt").unlink()
    untouched = (project / "data/raw/notes/same.txt").stat().st_mtime_ns
    assert counts(collect(params("in"), project)) == (1, 2, 1, 1)
    assert (project / "data/raw/notes/same.txt").stat().st_mtime_ns == untouched
    assert collected(project) == {
        "same.txt": "before",
        "longer.txt": "before and after",
        "equally long.txt": "behind",
        "gone.txt": "before",
        "new.txt": "new",
    }


def test_times_and_modes_of_files_do_not_matter(project: Path) -> None:
    file = write(project / "in/a.txt")
    collect(params("in"), project)
    file.chmod(0o600)
    os.utime(file, (1, 1))
    assert counts(collect(params("in"), project)) == (0, 0, 1, 0)


def test_a_changed_file_never_shows_through_a_hard_link_to_the_old_one(project: Path) -> None:
    file = write(project / "in/a.txt", "old")
    collect(params("in"), project)
    cached = project / "cache"
    os.link(project / "data/raw/notes/a.txt", cached)
    file.write_text("new")
    collect(params("in"), project)
    assert cached.read_text() == "old"


def test_what_a_killed_copy_left_behind_is_removed(project: Path) -> None:
    write(project / "in/a.txt")
    write(project / "data/raw/notes/.partial-a.txt", "ha")
    assert counts(collect(params("in"), project)) == (1, 0, 0, 0)
    assert set(collected(project)) == {"a.txt"}


def test_a_link_to_a_folder_above_does_not_go_round_in_circles(project: Path) -> None:
    write(project / "in/sub/a.txt")
    (project / "in/sub/up").symlink_to(project / "in")
    collect(params("in"), project)
    assert "sub/a.txt" in collected(project)


def _empty_folder(project: Path) -> None:
    (project / "in").mkdir()


def _broken_link(project: Path) -> None:
    write(project / "in/a.txt")
    (project / "in/b.txt").symlink_to("nowhere")


def _pipe(project: Path) -> None:
    (project / "in").mkdir()
    os.mkfifo(project / "in/a.txt")


def _names_that_differ_in_case(project: Path) -> None:
    write(project / "in/a.txt")
    write(project / "in/A.txt")


def _a_folder_in_the_way(project: Path) -> None:
    write(project / "in/a.txt")
    (project / "data/raw/notes/a.txt").mkdir(parents=True)


def _a_file_in_the_way(project: Path) -> None:
    write(project / "in/a/b.txt")
    write(project / "data/raw/notes/a", "")


def _a_name_that_is_not_utf8(project: Path) -> None:
    (project / "in").mkdir()
    Path(os.fsdecode(os.fsencode(project / "in") + b"/caf\xe9.txt")).write_text("text")


def _nothing(project: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "uri", "message"),
    [
        (_nothing, "in", r"in: no such file"),
        (_nothing, "in/*.txt", r"in/\*\.txt: no file ends in \.txt, \.txt\.gz, \.txt\.zst"),
        (_empty_folder, "in", r"in: no file ends in \.txt"),
        (_empty_folder, "in/", r"in/: no file ends in \.txt"),
        (_broken_link, "in", r"b\.txt: a link to nowhere, which does not exist"),
        (_pipe, "in", r"a\.txt: not a regular file"),
        (_names_that_differ_in_case, "in", r"A\.txt and .*a\.txt would get the same name"),
        (_a_folder_in_the_way, "in", r"an earlier file or folder is there"),
        (_a_file_in_the_way, "in", r"an earlier file or folder is there"),
        (_a_name_that_is_not_utf8, "in", r"its name is not UTF-8"),
        (_nothing, "package://no_such_package/x.txt", r"no package 'no_such_package' is installed"),
        (_nothing, "package://bible", r"no file is named"),
        (_nothing, "package://bible/data/none.txt", r"data/none\.txt: no such file"),
        (_nothing, "s3://bucket/x.txt", r"'s3://' is not supported"),
    ],
)
def test_a_source_that_cannot_be_copied_is_named_in_one_line(project, prepare, uri, message) -> None:  # type: ignore[no-untyped-def]
    prepare(project)
    with pytest.raises(BadInput, match=message) as refused:
        collect(params(uri), project)
    assert str(refused.value).startswith("source 'notes': ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("forbidden", ["in/a.txt", "in/sub"])
def test_an_unreadable_file_or_folder_is_named(forbidden: str) -> None:
    # Not below pytest's folder, which another user cannot enter.
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        project.chmod(0o777)
        write(project / "in/a.txt")
        write(project / "in/sub/b.txt")
        (project / forbidden).chmod(0)
        child = os.fork()
        if child == 0:
            # Nothing is unreadable to root.
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                collect(params("in"), project)
            except BadInput as error:
                os._exit(0 if f"{forbidden}: cannot be read (Permission denied)" in str(error) else 3)
            finally:
                os._exit(4)
        _, status = os.waitpid(child, 0)
        (project / forbidden).chmod(0o755)
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_command_says_what_was_copied(project: Path, run_stage, write_params) -> None:  # type: ignore[no-untyped-def]
    write(project / "in/a.txt", "12345")
    source = {"name": "notes", "uri": "in", "format": "txt", "licence": "CC0-1.0"}
    write_params(collect={"sources": [source]})
    result = run_stage("collect")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "notes: 1 new, 0 changed, 0 unchanged, 0 kept; 5 bytes at the source\n"


def test_the_command_ends_with_one_line_when_a_file_is_missing(run_stage, write_params, the_error) -> None:  # type: ignore[no-untyped-def]
    write_params(collect={"sources": [{"name": "notes", "uri": "gone.txt", "format": "txt", "licence": "CC0-1.0"}]})
    assert "source 'notes': gone.txt: no such file" in the_error(run_stage("collect"))
