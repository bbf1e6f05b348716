"""Collecting: what is copied, what is left alone, and what is refused."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny

from tasks.collect import report as reports
from tasks.collect.collect import collect
from tasks.collect.faults import unreadable
from tasks.collect.report import CollectReport
from tasks.errors import BadInput, TryAgain
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
    return source.new, source.changed, source.unchanged, source.gone


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
        ("in/s*/**", {"sub/d.txt.zst", "sub/deep/e.txt"}),
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


def test_what_has_gone_from_a_source_is_told_in_one_line(project: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write(project / f"in/{name}.txt", name)
    assert collect(params("in"), project).notices == []
    (project / "in/a.txt").unlink()
    assert collect(params("in"), project).notices == [
        "notes: 1 file is no longer at in (a.txt); kept and still used (delete it in data/raw/notes to withdraw it)"
    ]
    write(project / "elsewhere/e.txt", "e")
    assert collect(params("elsewhere"), project).notices == [
        "notes: 4 files are no longer at elsewhere (a.txt, b.txt, c.txt and 1 more); kept and still used "
        "(delete them in data/raw/notes to withdraw them)"
    ]
    for name in ("a", "b", "c", "d"):
        (project / f"data/raw/notes/{name}.txt").unlink()
    assert collect(params("elsewhere"), project).notices == []


def test_a_source_that_was_removed_is_told_and_left_alone(project: Path) -> None:
    write(project / "in/a.txt")
    collect(params("in", name="old"), project)
    write(project / "data/raw/caf\udce9\n", "never collected")
    (project / "data/raw/.gitignore").touch()
    report = collect(params("in"), project)
    assert report.unused == ["caf\\udce9\\n", "old"]
    assert report.notices[1] == (
        "data/raw/old: no source in params.yaml has this name; kept and not used "
        "(delete data/raw/old if it is not to return)"
    )
    assert (project / "data/raw/old/a.txt").exists()


def test_a_relative_uri_can_start_elsewhere(project: Path) -> None:
    write(project / "in/a.txt")
    worktree = project / ".overnight/worktrees/night"
    collect(params("in"), worktree, relative_to=project)
    assert set(collected(worktree)) == {"a.txt"}
    assert not (project / "data").exists()


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


def test_a_folder_with_the_ending_of_a_text_is_a_folder(project: Path) -> None:
    write(project / "in/all.txt/a.txt")
    collect(params("in"), project)
    assert set(collected(project)) == {"all.txt/a.txt"}


def test_a_link_to_itself_matters_only_when_it_looks_like_a_text(project: Path) -> None:
    write(project / "in/a.txt")
    (project / "in/loop").symlink_to("loop")
    collect(params("in"), project)
    assert set(collected(project)) == {"a.txt"}


def test_names_in_any_script_are_kept(project: Path) -> None:
    names = {
        "\u65e5\u8a18\u3000\u4e00.txt",
        "\u0928\u094d\u200d.txt",
        "9\u202fAM.txt",
        "\U0001f468\u200d\U0001f469.txt",
    }
    for name in names:
        write(project / "in" / name)
    collect(params("in"), project)
    assert set(collected(project)) == names


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOENT, TryAgain, "a.txt: vanished while it was collected. Run again."),
        (errno.ESTALE, TryAgain, "a.txt: cannot be read (Stale file handle). Run again when the place answers."),
        (errno.EACCES, BadInput, "a.txt: cannot be read (Permission denied). Mend its permissions or remove it."),
        (errno.EINVAL, BadInput, "a.txt: cannot be read (Invalid argument). Mend or remove it."),
    ],
)
def test_trying_again_is_for_what_passes(number: int, kind: type[Exception], message: str) -> None:
    source = params("in").sources[0]
    error = unreadable(source, "a.txt", OSError(number, os.strerror(number)))
    assert isinstance(error, kind)
    assert str(error) == f"source 'notes': {message}"


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


def _a_folder_of_texts(project: Path) -> None:
    write(project / "in/all.txt/a.txt")


def _a_name_with_a_line_break(project: Path) -> None:
    write(project / "in/a\nb.txt")


def _a_link_to_itself(project: Path) -> None:
    write(project / "in/a.txt")
    (project / "in/b.txt").symlink_to("b.txt")


def _a_text(project: Path) -> None:
    write(project / "in/a.txt")
    write(project / "data/raw/other/b.txt")


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
        (
            _a_folder_of_texts,
            "in/*.txt",
            r"only folders match, such as .*in/all\.txt\. Write in/\*\.txt/\*\* for the files",
        ),
        (_a_name_with_a_line_break, "in", r"in/a\\nb\.txt: its name holds a line break"),
        (
            _a_link_to_itself,
            "in",
            r"b\.txt: cannot be read \(Too many levels of symbolic links\)\. The link leads back",
        ),
        (_a_text, ".", r"\.: data/raw lies there"),
        (_a_text, "**/*.txt", r"data/raw lies there"),
        (_a_text, "data/raw/other", r"data/raw lies there"),
        (_a_text, "data/raw/other/b.txt", r"data/raw lies there"),
        (_nothing, "~no_such_user/texts", r"there is no such user"),
        (_nothing, "x" * 300, r"cannot be read \(File name too long\)\. Shorten the name"),
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


@pytest.mark.parametrize(
    ("forbidden", "message"),
    [
        ("in/a.txt", "in/a.txt: cannot be read (Permission denied)"),
        ("in/sub", "in/sub: cannot be read (Permission denied)"),
        ("data/raw", "data/raw/notes: cannot be written (Permission denied)"),
    ],
)
def test_an_unreadable_file_or_folder_is_named(forbidden: str, message: str) -> None:
    # Not below pytest's folder, which another user cannot enter.
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        project.chmod(0o777)
        write(project / "in/a.txt")
        write(project / "in/sub/b.txt")
        (project / "data/raw").mkdir(parents=True)
        (project / forbidden).chmod(0o555 if forbidden == "data/raw" else 0)
        child = os.fork()
        if child == 0:
            # Nothing is unreadable to root.
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                collect(params("in"), project)
            except BadInput as error:
                os._exit(0 if message in str(error) else 3)
            finally:
                os._exit(4)
        _, status = os.waitpid(child, 0)
        (project / forbidden).chmod(0o755)
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_command_says_what_was_copied(project: Path, run_stage, write_params) -> None:  # type: ignore[no-untyped-def]
    write(project / "in/a.txt", "12345")
    source = {"name": "notes", "uri": "in", "format": "txt", "licence": "CC0-1.0"}
    write_params(collect={"sources": [source]})
    write(project / "data/raw/notes/gone.txt", "earlier")
    events = project / "events"
    result = run_stage("collect", OVERNIGHT_EVENTS=str(events))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "notes: 1 new, 0 changed, 0 unchanged, 1 gone; 5 bytes at the source\n"
    report = reports.read(project)
    assert report.has_news
    assert report.sources[0].model_dump() == {
        "name": "notes", "new": 1, "changed": 0, "unchanged": 0, "gone": 1, "bytes": 5,
    }  # fmt: skip
    (notice,) = report.notices
    # Whoever started it shows its progress: nothing is drawn.
    assert result.stderr == ""
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert [(event["stage"], event["done"], event["total"], event["notice"]) for event in told] == [
        ("collect", 5, 5, ""),
        ("collect", 5, 5, notice),
    ]


def test_a_second_collecting_has_no_news(project: Path) -> None:
    write(project / "in/a.txt")
    assert collect(params("in"), project).has_news
    assert not collect(params("in"), project).has_news


def test_the_command_ends_with_one_line_when_a_file_is_missing(  # type: ignore[no-untyped-def]
    project: Path, run_stage, write_params, the_error
) -> None:
    write(project / reports.REPORT, "of an earlier collecting")
    write_params(collect={"sources": [{"name": "notes", "uri": "gone.txt", "format": "txt", "licence": "CC0-1.0"}]})
    assert "source 'notes': gone.txt: no such file" in the_error(run_stage("collect"))
    # A report of what was never finished would be taken for today's.
    assert not (project / reports.REPORT).exists()
    with pytest.raises(BadInput, match="no report of collecting"):
        reports.read(project)


def test_a_night_without_a_checkpoint_waits_for_no_model_code() -> None:
    told = "import sys, tasks.collect.__main__; print(sorted({'numpy', 'torch', 'lm.config'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", told], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
