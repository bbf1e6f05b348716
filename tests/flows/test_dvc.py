"""What is read from DVC: its graph, its status, and how its commands end."""

import os
import pwd
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flows import dvc, dvc_lock, process
from tasks.errors import UserMistake

if TYPE_CHECKING:
    from conftest import Project

# As DVC 3.67 prints them.
RAN = (
    "Running stage 'train':\n> python -m tasks.train\nGenerating lock file 'dvc.lock'\nUpdating lock file 'dvc.lock'\n"
)
UNCHANGED = "Stage 'train' didn't change, skipping\nData and pipelines are up to date.\n"
RESTORED = "Stage 'train' is cached - skipping run, checking out outputs\nUpdating lock file 'dvc.lock'\n"


def failed(own: str, code: int) -> str:
    return (
        f"Running stage 'train':\n> python -m tasks.train\n{own}"
        f"ERROR: failed to reproduce 'train': failed to run: python -m tasks.train, exited with {code}\n"
    )


@pytest.mark.parametrize(
    ("last", "reason", "told"),
    [
        (
            "failed to push data to the cloud - 2 files failed to upload",
            "[Errno 28] No space left on device: 'a' -> '/shelf/a'",
            ". The remote is full: make room there and run again.",
        ),
        (
            "failed to push data to the cloud - 2 files failed to upload",
            "[Errno 5] An error occurred (XMinioStorageFull) when calling the PutObject operation: no room",
            ". The remote is full: make room there and run again.",
        ),
        (
            "failed to pull data from the cloud - 2 files failed to download",
            "[Errno 28] No space left on device: '/shelf/a' -> 'a'",
            ". Free some space and run again.",
        ),
        ("failed to push data to the cloud - 2 files failed to upload", "no bucket", ""),
    ],
)
def test_why_files_were_not_moved_is_told(last: str, reason: str, told: str) -> None:
    output = f"ERROR: failed to transfer 'a0' - {reason}\nERROR: failed to transfer 'b1' - other\nERROR: {last}\n"
    result = dvc.classify(255, output)
    assert (result.message, result.full) == (f"{last}: {reason}{told}", "run again" in told)


def test_a_refusal_of_the_remote_is_told_from_its_silence() -> None:
    # As S3 has it in DVC's words: a key that may not write, a bucket that is not there, a server that is down.
    denied = "An error occurred (AccessDenied) when calling the PutObject operation: Access Denied"
    last = "ERROR: failed to push data to the cloud - 1 files failed to upload\n"
    assert dvc.classify(255, f"ERROR: failed to transfer 'a0' - {denied}\n{last}").refused
    assert dvc.classify(255, "ERROR: unexpected error - The specified bucket does not exist\n").refused
    # As S3 answers when credentials have expired: HEAD has no words.
    expired = "An error occurred (ExpiredToken) when calling the PutObject operation: The provided token has expired."
    assert dvc.classify(255, f"ERROR: failed to transfer 'a0' - {expired}\n{last}").refused
    head = "[Errno 22] Bad Request: An error occurred (400) when calling the HeadObject operation: Bad Request"
    assert dvc.classify(255, f"ERROR: unexpected error - {head}\n").refused
    assert dvc.classify(255, f"ERROR: {expired.replace('operation:', 'operation (reached max retries: 4):')}\n").refused
    # Of a server of HTTP, a proxy, and a login at AWS that has run out.
    for refusal in (
        "401, message='Unauthorized', url=URL('http://shelf.example/a0')",
        "407, message='Proxy Authentication Required', url=URL('http://shelf.example/a0')",
        "Error when retrieving token from sso: Token has expired and refresh failed",
        "The SSO session associated with this profile has expired or is otherwise invalid.",
        "The config profile (nightly) could not be found",
        "[Errno 13] Permission denied: '/mnt/timeout/store'",
        "[Errno 20] Not a directory: '/mnt/file/store/files/md5/24/86809b117070d678317e367178b744'",
        "[Errno 30] Read-only file system: '/mnt/store'",
    ):
        assert dvc.classify(255, f"ERROR: failed to transfer 'a0' - {refusal}\n{last}").refused
    busy = "[Errno 16] Service Unavailable: An error occurred (503) when calling the HeadObject operation"
    assert not dvc.classify(255, f"ERROR: unexpected error - {busy}\n").refused
    for silent in (
        "Connection refused",
        'Connect timeout on endpoint URL: "https://credentials.example/a0"',
        "Max retries exceeded while fetching credentials",
        # A folder by such a name, on a share that is not mounted.
        "[Errno 2] No such file or directory: '/mnt/forbidden/sso token'",
        "[Errno 5] Input/output error: '/mnt/credentials/store'",
        "[Errno 5] Input/output error: '/mnt/credentials/.a0.tmp' -> '/mnt/credentials/a0'",
        '[Errno 5] Input/output error: "/mnt/the forbidden city\'s/store"',
    ):
        assert not dvc.classify(255, f"ERROR: failed to transfer 'a0' - {silent}\n{last}").refused


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "unexpected error - Forbidden: An error occurred (403) when calling the HeadObject operation: Forbidden",
            "unexpected error - An error occurred (403) when calling the HeadObject operation: Forbidden",
        ),
        (
            "[Errno 5] Slow: An error occurred (SlowDown) when calling the PutObject operation (max retries: 4): Slow",
            "An error occurred (SlowDown) when calling the PutObject operation (max retries: 4): Slow",
        ),
        (
            "unexpected error - Forbidden: An error occurred (403) when calling the HeadObject operation: No",
            "unexpected error - Forbidden: An error occurred (403) when calling the HeadObject operation: No",
        ),
    ],
)
def test_what_s3_has_answered_is_told_once(said: str, told: str) -> None:
    # As DVC 3.67 writes it, with dvc-s3 3.3.
    assert dvc.classify(255, f"ERROR: {said}\n").message == told


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, RAN, dvc.Result("ran")),
        (0, UNCHANGED, dvc.Result("cached")),
        (0, RESTORED, dvc.Result("cached")),
        # A mistake: no retry, and of two error lines the last one.
        (255, failed("error: first\nerror: second\n", 2), dvc.Result("failed", 2, "second")),
        # A bug of ours: the traceback's last line.
        (
            255,
            failed('Traceback (most recent call last):\n  File "a.py"\nValueError: no\n', 1),
            dvc.Result("failed", 1, "ValueError: no"),
        ),
        (255, failed("error: rank 1 was killed\n", 75), dvc.Result("failed", 75, "rank 1 was killed", mendable=True)),
        (
            255,
            failed("step 3\nKilled\n", 137),
            dvc.Result("failed", 137, "its process was killed by SIGKILL (often the kernel, short of memory)", True),
        ),
        (255, failed("", -11), dvc.Result("failed", -11, "its process was killed by SIGSEGV", mendable=True)),
        (143, "Running stage 'train':\n", dvc.Result("failed", None, "DVC was killed by SIGTERM", mendable=True)),
        (
            255,
            "ERROR: Unable to acquire lock. Most likely another DVC process runs\n",
            dvc.Result("failed", None, "Unable to acquire lock. Most likely another DVC process runs", True, True),
        ),
        (
            255,
            "ERROR: failed to reproduce 'train': [Errno 2] No such file or directory: 'data/shards'\n",
            dvc.Result(
                "failed", None, "failed to reproduce 'train': [Errno 2] No such file or directory: 'data/shards'"
            ),
        ),
        (
            255,
            "ERROR: unexpected error - object 1ee8f0.dir is corrupted: Expecting value: line 1 column 1 (char 0)\n\n",
            dvc.Result(
                "failed",
                None,
                "unexpected error - object 1ee8f0.dir is corrupted: Expecting value: line 1 column 1 (char 0). A "
                "folder's listing is damaged in DVC's cache or at its remote: `overnight push`, where a good "
                "copy is left, mends it in both.",
            ),
        ),
        (1, "", dvc.Result("failed", None, "DVC ended with exit code 1")),
    ],
)
def test_classify(code: int, output: str, expected: dvc.Result) -> None:
    assert dvc.classify(code, output) == expected


def execute(project: "Project", command: list[str]) -> dvc.Result:
    log = project.root / "log"
    log.unlink(missing_ok=True)
    code = process.run(command, log, dvc.environment(project.environment()), lambda event: None)
    return dvc.classify(code, log.read_text())


def test_the_graph_is_that_of_dvc_yaml(project: "Project") -> None:
    stages = dvc.graph(project.root).stages
    assert [(stage.name, stage.upstream) for stage in stages] == [
        ("first", ()), ("second", ("first",)), ("third", ("second",))
    ]  # fmt: skip
    assert stages[0].description == "Read what was collected."
    assert stages[0].reads_collected
    assert not stages[1].reads_collected
    assert stages[2].outputs == (Path("out/third.json"),)


def test_a_stage_through_its_life(project: "Project") -> None:
    (project.root / "data/raw").mkdir(parents=True)
    (project.root / "data/raw/a").write_text("text")
    assert execute(project, dvc.add_command(Path("data/raw"))).outcome == "cached"
    # The folder under `dvc add` is a node of DVC's graph, but no stage.
    assert dvc.graph(project.root).names() == ["collect", "first", "second", "third"]
    assert dvc.changes(project.root).stages["first"].never_run

    assert execute(project, dvc.repro_command("first")).outcome == "ran"
    assert execute(project, dvc.repro_command("first")).outcome == "cached"
    assert "first" not in dvc.changes(project.root).stages
    assert execute(project, dvc.repro_command("first", force=True)).outcome == "ran"

    project.set("ingest", "max_reject_rate", 0.5)
    (project.root / "data/raw/a").write_text("other")
    (project.root / "out/first.txt").unlink()
    changes = dvc.changes(project.root)
    assert not changes.stages["first"].never_run
    assert sorted(map(str, changes.stages["first"].changes)) == [
        "data/raw modified",
        "out/first.txt deleted",
        "params.yaml: ingest.max_reject_rate modified",
    ]
    assert list(changes.data) == ["data/raw.dvc"]

    project.ran()
    project.set("ingest", "max_reject_rate", 0.01)
    (project.root / "data/raw/a").write_text("text")
    assert execute(project, dvc.repro_command("first")).outcome == "cached"
    assert project.ran() == []
    assert (project.root / "out/first.txt").read_text() == "text"


def test_a_changed_command_is_a_change(project: "Project") -> None:
    (project.root / "data/raw").mkdir(parents=True)
    execute(project, dvc.repro_command("first"))
    file = project.root / "dvc.yaml"
    file.write_text(file.read_text().replace("stage.py first", "./stage.py first"))
    assert list(map(str, dvc.changes(project.root).stages["first"].changes)) == ["command changed"]


def test_the_exit_code_and_the_error_line_of_a_stage_come_through(project: "Project") -> None:
    (project.root / "data/raw").mkdir(parents=True)
    project.do("first", "print('error: no text here', file=sys.stderr); sys.exit(2)")
    assert execute(project, dvc.repro_command("first")) == dvc.Result("failed", 2, "no text here")
    project.do("first", "os.kill(os.getpid(), 9)")
    result = execute(project, dvc.repro_command("first"))
    assert (result.outcome, result.mendable) == ("failed", True)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("stages:\n  first: {cmd: [}\n", "dvc.yaml"),
        ("stages:\n  first:\n    cmd: x\n    ouuts: [a]\n", "ouuts"),
        (
            "stages:\n  a: {cmd: x, deps: [p], outs: [q]}\n  b: {cmd: x, deps: [q], outs: [p]}\n",
            "both a dependency and an output",
        ),
    ],
)
def test_a_broken_dvc_yaml_is_one_line(project: "Project", content: str, complaint: str) -> None:
    (project.root / "dvc.yaml").write_text(content)
    with pytest.raises(UserMistake) as caught:
        dvc.graph(project.root)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tables_of_dvc_that_are_damaged_or_have_no_room_are_one_line(
    project: "Project", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "site"
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(place))
    dvc.changes(project.root)
    for file in place.rglob("*.db"):
        file.write_bytes(b"no table" * 4096)
    with pytest.raises(UserMistake, match="DVC cannot use the tables that it keeps there") as caught:
        dvc.changes(project.root)
    assert str(caught.value).startswith(f"{place}: ")
    assert "\n" not in str(caught.value)
    shutil.rmtree(place / "repo")
    dvc.changes(project.root)


def test_tables_of_dvc_that_somebody_else_writes_to_are_not_damaged(project: "Project") -> None:
    with pytest.raises(dvc_lock.Busy, match="ask again when it has ended"), dvc.store(project.root):
        raise sqlite3.OperationalError("database is locked")


def test_a_kind_of_remote_whose_package_is_not_installed_is_one_line(
    project: "Project", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dvc_s3", None)
    (project.root / ".dvc/config.local").write_text(
        "[core]\n    remote = bucket\n['remote \"bucket\"']\n    url = s3://team/models\n"
    )
    told = "^DVC's remote 'bucket': s3 is supported, but requires 'dvc-s3' to be installed .*`python -m pip install`"
    with pytest.raises(UserMistake, match=told) as caught, dvc.store(project.root):
        pass
    assert "\n" not in str(caught.value)


def test_a_user_without_a_name_has_a_number(project: "Project", monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    # As in a container that runs as whoever started it.
    monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
    dvc.graph(project.root)
    assert dvc.environment({})["LOGNAME"] == str(os.getuid())
    assert "LOGNAME" not in dvc.environment({"USER": "somebody"})


def test_a_stage_sees_no_setting_of_prefect_and_one_shell() -> None:
    given = {"PREFECT_API_KEY": "secret", "SHELL": "/usr/bin/fish", "PATH": "/bin", "KEPT": "1"}
    made = dvc.environment(given)
    assert not any(name.startswith("PREFECT_") for name in made)
    assert (made["SHELL"], made["KEPT"]) == ("/bin/sh", "1")
