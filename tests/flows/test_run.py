"""Whole runs of the small project against Prefect's temporary server, or one that stands where that matters not."""

import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prefect_server import ask
from processes import alive, left_within
from waiting import until

from flows import computed, environment, lock, status
from flows.project import parameters
from flows.watch import StageRun, exit_code

if TYPE_CHECKING:
    from conftest import Project

# A stage that stays, with a worker in a session of its own.
STAY = """
    worker = [sys.executable, "-c", "import time; time.sleep(600)"]
    subprocess.Popen(worker, start_new_session=True)
    pathlib.Path("staying").write_text("")
    time.sleep(600)
"""
PROGRESS = """
    from tasks.progress import progress
    with progress("first") as shown:
        shown.begin("read")
        shown.update(1, 2, "documents", loss=0.5)
        time.sleep(0.3)
        shown.update(2, 2, "documents", loss=0.25)
"""
NOISE = ("prefect", "database is locked", "traceback", "http", "warning")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first run of this module leaves its database: making the tables anew takes most of a run's time."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def nightly(project: "Project", database: Path) -> "Project":
    """The small project, with a Prefect database where an earlier test has made one."""
    shutil.copytree(database, project.root / ".overnight/prefect", dirs_exist_ok=True)
    return project


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Lets Ctrl-C reach what a test starts, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def task_states(api: str, flow_run: str) -> dict[str, str]:
    """The state of each task run of ``flow_run``, as the server has it."""
    wanted = {"flow_runs": {"id": {"any_": [flow_run]}}}
    return {one["name"]: one["state_name"] for one in ask(api, "task_runs/filter", wanted)}


def flow_states(root: Path) -> list[str]:
    with sqlite3.connect(root / ".overnight/prefect/prefect.db") as connection:
        return [name for (name,) in connection.execute("select state_name from flow_run order by created")]


def run_of(root: Path) -> str:
    """The run at work, or the last one that was stopped."""
    return str(json.loads((root / ".overnight/running.json").read_text())["run"])


def test_a_run_does_what_is_needed_and_nothing_else(project: "Project", database: Path, server: str) -> None:
    project.do("first", PROGRESS)
    (project.root / "requirements.lock").touch()
    first = project.overnight("run", ATEN_CPU_CAPABILITY="avx2")
    assert (first.returncode, project.ran()) == (0, ["first", "second", "third"]), first.stderr
    assert not [word for word in NOISE if word in (first.stdout + first.stderr).lower()], first.stderr
    assert flow_states(project.root) == ["Completed"]
    for file in ("prefect.db", "prefect.db-wal", "prefect.db-shm"):
        if (project.root / ".overnight/prefect" / file).exists():
            shutil.copy(project.root / ".overnight/prefect" / file, database)
    with sqlite3.connect(project.root / ".overnight/prefect/prefect.db") as connection:
        reports = dict(connection.execute("select key, data from artifact").fetchall())
    assert "letters | 18" in reports["third-third"]
    assert float(reports["first-progress"]) == 100.0
    assert float(reports["collect-progress"]) == 100.0
    assert any("first     read 2/2" in line and "loss 0.25" in line for line in first.stderr.splitlines())

    with (project.root / "night.log").open("w") as log:
        assert subprocess.run([sys.executable, "-m", "flows", "run"], cwd=project.root, env=project.environment(),
                              stdout=log, stderr=log).returncode == 0  # fmt: skip
    assert project.ran() == []
    # In one log each line has its time, the first and the last one name the run, and no stage is listed twice.
    lines = (project.root / "night.log").read_text().splitlines()
    told = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*\S)", line) for line in lines if line]
    said = [line[1] for line in told if line is not None]
    assert len(said) == len(told), lines
    assert re.fullmatch(rf"run \S+ starts in {project.root}", said[0])
    assert re.fullmatch(r"run \S+ ends: completed in \d+ s", said[-1])
    assert [line.split()[1] for line in said if "cached" in line] == ["cached"] * 4

    project.set("train", "learning_rate", 0.5)
    project.set("ingest", "max_reject_rate", 0.5)
    status = project.overnight("status").stdout.splitlines()
    assert status == [
        "collect: up to date",
        "first: stale: params.yaml: ingest.max_reject_rate modified",
        "second: stale: params.yaml: train.learning_rate modified; first is stale",
        "third: stale: second is stale",
    ]
    # first is stale, and --from leaves it as it is. second writes the same as before, so third has nothing to do.
    third = project.overnight("run", "--from", "second", PREFECT_API_URL=server, ATEN_CPU_CAPABILITY="default")
    assert (third.returncode, project.ran()) == (0, ["second"]), third.stderr
    assert [line.split()[1] for line in third.stdout.splitlines()[:4]] == ["skipped", "skipped", "ran", "cached"]
    assert "stale, and left out by --from: what follows is of what it made" in third.stdout.splitlines()[1]
    assert not list((project.root / ".overnight/logs").rglob("*.events"))
    # Each stage's environment is noted; the others are found as they were.
    here = environment.record(project.root).model_copy(update={"variables": {"ATEN_CPU_CAPABILITY": "avx2"}})
    assert computed.elsewhere(project.root, here) == {"second": {"variables.ATEN_CPU_CAPABILITY": "default"}}


@pytest.mark.parametrize(
    ("codes", "expected"), [([2], 2), ([2, 2], 2), ([2, 75], 1), ([75], 1), ([None], 1), ([], 1)], ids=str
)
def test_a_run_that_met_mistakes_alone_ends_with_their_code(codes: list[int | None], expected: int) -> None:
    assert exit_code([StageRun("second", "failed", 1.0, "why", code) for code in codes]) == expected


def test_a_source_of_which_nothing_was_collected_is_named(nightly: "Project") -> None:
    names = [source.name for source in parameters(nightly.root).collect.sources]
    for name in names:
        (nightly.root / "data/raw" / name).mkdir(parents=True, exist_ok=True)
    assert status._uncollected(nightly.root, parameters(nightly.root)) == []
    (nightly.root / "data/raw" / names[0]).rename(nightly.root / "data/raw/another")
    assert status._uncollected(nightly.root, parameters(nightly.root)) == names[:1]


def test_before_the_first_run_there_is_none_to_list(nightly: "Project") -> None:
    listed = nightly.overnight("runs")
    assert (listed.returncode, listed.stdout) == (0, "")
    assert listed.stderr == "no run yet; `overnight run` starts the first.\n"


def test_a_failure_ends_the_run_and_is_remembered_until_it_is_mended(nightly: "Project", server: str) -> None:
    nightly.do("second", "print('error: there is no text; bring some', file=sys.stderr); sys.exit(2)")
    failed = nightly.overnight("run", PREFECT_API_URL=server)
    # A mistake is not tried again, though `second` has a retry.
    assert (failed.returncode, nightly.ran()) == (2, ["first", "second"])
    assert "error: second: there is no text; bring some" in failed.stderr
    # The failure is told once: not in the lines of its log, and not once more by who frames it.
    assert failed.stderr.count("there is no text; bring some") == 1
    assert "failed to reproduce" not in failed.stderr
    # Running it again mends nothing.
    assert re.search(r"^Change that first, then go on with: overnight rerun \S+$", failed.stderr, re.MULTILINE)
    name = re.search(r" run (\S+) ends: failed in \d+ s$", failed.stderr)
    assert name
    log = next(line.rpartition(" ")[2] for line in failed.stderr.splitlines() if line.startswith("The whole log"))
    assert "error: there is no text" in (nightly.root / log).read_text()
    assert "not started, because of second" in failed.stdout
    (flow_run,) = ask(server, "flow_runs/filter", {"flow_runs": {"name": {"any_": [name[1]]}}})
    assert flow_run["state_name"] == "Failed"
    # The server notes a task's states as their events come.
    until(lambda: task_states(server, flow_run["id"]).items() >= {"second": "Failed", "third": "Skipped"}.items())
    assert "second: failed: there is no text; bring some" in nightly.overnight("status").stdout.splitlines()

    # A fault that passes: the second attempt succeeds within the same run.
    nightly.do(
        "second",
        """
        if not os.path.exists("tried"):
            open("tried", "w").close()
            print("error: rank 1 was killed", file=sys.stderr)
            sys.exit(75)
        """,
    )
    mended = nightly.overnight("run", PREFECT_API_URL=server)
    assert (mended.returncode, nightly.ran()) == (0, ["second", "second", "third"]), mended.stderr
    assert "rank 1 was killed; attempt 2 starts" in mended.stderr
    assert "second: up to date" in nightly.overnight("status").stdout.splitlines()


def test_sigterm_leaves_no_process_and_meanwhile_no_other_run_starts(nightly: "Project") -> None:
    nightly.do("second", STAY)
    flow = nightly.start("run")
    until((nightly.root / "staying").exists)

    other = nightly.overnight("run")
    assert other.returncode == 75
    assert f"(process {flow.pid}) is at work in this project since" in other.stderr
    assert len(other.stderr.splitlines()) == 1
    status = nightly.overnight("status")
    assert (status.returncode, status.stderr) == (0, "")
    assert re.sub(r"\d\d:\d\d:\d\d", "TIME", status.stdout).splitlines() == [
        "collect: up to date",
        "first: up to date",
        f"second: running: since TIME (run {run_of(nightly.root)}, process {flow.pid})",
        "third: waiting",
    ]

    started = time.monotonic()
    flow.send_signal(signal.SIGTERM)
    out, err = flow.communicate(timeout=30)
    while nightly.processes():
        time.sleep(0.05)
        assert time.monotonic() - started < 10, nightly.processes()
    assert time.monotonic() - started < 10
    assert flow.returncode == 143, err
    assert err.splitlines()[-1].endswith(" terminated; `overnight rerun` goes on where this run stopped.")
    assert not [word for word in NOISE if word in (out + err).lower()], err
    assert flow_states(nightly.root)[-1] == "Crashed"
    stopped = nightly.overnight("status").stdout.splitlines()[2]
    assert stopped == f"second: stopped: before its end (run {run_of(nightly.root)})"


def test_ctrl_c_says_that_rerun_goes_on(nightly: "Project", ctrl_c: None, server: str) -> None:
    nightly.do("second", STAY)
    flow = nightly.start("run", "--force", PREFECT_API_URL=server)
    until((nightly.root / "staying").exists)
    flow.send_signal(signal.SIGINT)
    out, err = flow.communicate(timeout=30)
    assert flow.returncode == 130, err
    assert err.splitlines()[-1].endswith(" interrupted; `overnight rerun` goes on where this run stopped.")
    assert not [word for word in NOISE if word in (out + err).lower()], err
    stopped = nightly.overnight("runs").stdout
    assert "interrupted (Ctrl-C) at second" in stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_who_ends_a_run_that_waits_is_not_sent_to_another_one(
    number: signal.Signals, project: "Project", ctrl_c: None
) -> None:
    with lock.hold(project.root, "20260101-000000"):
        waiting = project.start("run", "--wait")
        assert waiting.stderr is not None
        assert "Waiting for it to end." in waiting.stderr.readline()
        waiting.send_signal(number)
        _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 128 + number
    (line,) = err.splitlines()
    how = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert line.endswith(f" {how} before the run had begun. Run the same command again.")
    assert "no run yet" in project.overnight("runs").stderr


def test_sigkill_leaves_no_process_and_the_next_run_goes_on_at_once(nightly: "Project") -> None:
    nightly.do("second", STAY)
    flow = nightly.start("run")
    until((nightly.root / "staying").exists)
    left = nightly.processes()
    # The flow, two supervisors, the server, DVC, the stage, its worker.
    assert len(left) >= 7
    flow.kill()
    started = time.monotonic()
    flow.communicate()
    nightly.do("second", "pass")
    nightly.ran()
    # It must not meet what the old run has left, and must not give up because of it either.
    following = nightly.start("run", "--from", "second")
    while any(map(alive, left)):
        assert time.monotonic() - started < 10, left
        time.sleep(0.05)
    _, err = following.communicate(timeout=120)
    assert (following.returncode, nightly.ran()) == (0, ["second", "third"]), err
    assert left_within(nightly.root) == []


def test_a_source_that_is_gone_fails_collect_and_nothing_else_starts(project: "Project", server: str) -> None:
    shutil.rmtree(project.root / "source")
    failed = project.overnight("run", PREFECT_API_URL=server)
    assert (failed.returncode, project.ran()) == (2, [])
    assert "error: collect: source 'small'" in failed.stderr
    assert failed.stdout.count("not started, because of") == 3
    assert project.overnight("status").stdout.startswith("collect: failed: source 'small'")
