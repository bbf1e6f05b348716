"""What a user meets before anything runs: help, and one clear line for each mistake."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny import ROOT
from typer.testing import CliRunner

from flows import cli
from flows.termination import EXIT_INTERRUPTED, EXIT_TERMINATED
from tasks.errors import EXIT_TRY_AGAIN, EXIT_USER_MISTAKE

if TYPE_CHECKING:
    from conftest import Project


def refuse(project: "Project", *arguments: str, **more: str) -> str:
    """Runs a command that must be refused with exit code 2; returns its one line."""
    done = project.overnight(*arguments, **more)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert project.ran() == []
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", [["run"], ["status"], ["generate", "text"]])
def test_a_folder_without_a_project(project: "Project", command: list[str]) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        (project.root / name).unlink()
    assert refuse(project, *command).endswith("no dvc.yaml here. Change to the project's folder and run this again.")


@pytest.mark.parametrize("name", ["dvc.yaml", "params.yaml"])
def test_a_project_that_has_lost_one_of_its_files(name: str, project: "Project") -> None:
    (project.root / name).unlink()
    told = f"a project without its {name}. `git checkout {name}` brings back the one that was committed."
    assert refuse(project, "status").endswith(told)


def test_a_broken_lock_of_dvc_says_how_it_comes_back(project: "Project") -> None:
    (project.root / "dvc.lock").write_text("stages: [\n")
    assert refuse(project, "status").endswith(" `git checkout dvc.lock` brings back the one that was committed.")


def test_a_missing_git_repository(project: "Project") -> None:
    shutil.rmtree(project.root / ".git")
    assert "not in a Git repository. Run `git init`" in refuse(project, "run")


def test_a_missing_dvc_repository(project: "Project") -> None:
    shutil.rmtree(project.root / ".dvc")
    assert "no DVC repository here. Run `dvc init`" in refuse(project, "run")


def test_an_unknown_key(project: "Project") -> None:
    project.set("train", "lerning_rate", 1)
    assert refuse(project, "run").endswith(
        "params.yaml: train.lerning_rate: unknown key; did you mean `learning_rate`?"
    )


def test_a_retry_of_a_stage_that_does_not_exist(project: "Project") -> None:
    project.set("flow", "retries", {"trian": 1})
    assert "flow.retries: there is no stage 'trian'; choose one of" in refuse(project, "run")


def test_an_unknown_stage(project: "Project") -> None:
    line = refuse(project, "run", "--from", "trian")
    assert line == "error: --from: there is no stage 'trian'; choose one of collect, first, second, third."


def test_a_server_that_is_not_there(project: "Project") -> None:
    line = refuse(project, "run", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert line.startswith("error: PREFECT_API_URL is http://127.0.0.1:9/api, and no Prefect server answers there")


def test_generating_before_there_is_a_model(project: "Project") -> None:
    assert "models/int8/model.onnx: no such file. Run `overnight run` first" in refuse(project, "generate", "text")


def test_generating_from_bytes_that_are_no_text(project: "Project") -> None:
    line = refuse(project, "generate", "caf\udce9")
    assert line == "error: TEXT is not UTF-8: byte 0xe9 after 3 characters. Write it in UTF-8."


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--frm", "x"], "No such option: --frm (Possible options: --force, --from). `overnight run --help`"),
        (["rnu"], "No such command 'rnu'. Did you mean 'run'? `overnight --help`"),
        (["--bogus"], "No such option: --bogus. `overnight --help`"),
        (["run", "--from"], "Option '--from' requires an argument. `overnight run --help`"),
        (["restore"], "Missing argument 'VERSION'. `overnight restore --help`"),
        (["promote", "a", "b"], "Got unexpected extra argument(s) (b). `overnight promote --help`"),
    ],
)
def test_a_slip_in_the_command_line_is_one_line(arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(cli.app, arguments, prog_name="overnight", env={"COLUMNS": "30", "TERMINAL_WIDTH": "30"})
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"error: {told} says what there is.\n"


def test_a_number_that_is_out_of_range_is_one_line() -> None:
    done = CliRunner().invoke(cli.app, ["schedule", "--port", "0"])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Invalid value for '--port': ")


def test_without_a_command_there_is_help_and_no_complaint() -> None:
    done = CliRunner().invoke(cli.app, [], prog_name="overnight")
    assert done.exit_code == 2
    assert "Usage: overnight" in done.output
    assert "error:" not in done.output


@pytest.mark.parametrize("arguments", [[], ["run"], ["status"], ["generate"]])
def test_help_reads_well_and_comes_at_once(arguments: list[str]) -> None:
    code = (
        "import resource, sys\nfrom flows.cli import app\n"
        "try: app([*sys.argv[1:], '--help'], prog_name='overnight')\n"
        "finally: print('CPU', sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    text, _, cpu = done.stdout.rpartition("CPU")
    # Processor time, which does not grow when the machine is busy.
    assert float(cpu) < 1.0
    assert "Usage: overnight" in text


def test_what_a_command_has_imported_is_not_looked_through_for_garbage() -> None:
    code = (
        "import atexit, gc\nbefore = gc.get_stats()[2]['collections']\n"
        "atexit.register(lambda: print('LEFT', len(gc.get_objects()), gc.get_stats()[2]['collections'] - before))\n"
        "from flows.cli import app\nimport dvc.repo\napp(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left, collections = map(int, done.stdout.rpartition("LEFT")[2].split())
    assert left < 1000
    assert collections <= 1


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("rerun", "the last one"),
        ("schedule", "02:00"),
        ("schedule", "this machine's"),
        ("serve", "the one that lies here"),
        ("push", "all"),
        ("restore", ".overnight/versions/VERSION"),
    ],
)
def test_help_says_what_is_taken_where_nothing_is_given(command: str, default: str) -> None:
    done = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert f"[default: ({default})]" in done.output


def test_help_names_the_exit_codes() -> None:
    told = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).output
    for code in (EXIT_USER_MISTAKE, EXIT_TRY_AGAIN, EXIT_INTERRUPTED, EXIT_TERMINATED):
        assert f" {code} " in told


def test_a_full_disk_leaves_no_compiled_file_cut_off(
    tmp_path: Path, small_disk: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    small_disk(disk, 64)
    (disk / "tasks").mkdir()
    shutil.copy(ROOT / "tasks/__init__.py", disk / "tasks")
    (disk / "tasks/large.py").write_text("\n".join(f"name_{number} = {number}" for number in range(300)))
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    # A page is left, which the compiled file begins to fill.
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 2 * 4096)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    subprocess.run([sys.executable, "-c", "import tasks.large"], cwd=disk, check=True)
    (disk / "ballast").unlink()
    subprocess.run([sys.executable, "-c", "import tasks.large"], cwd=disk, check=True)


def test_a_rebuild_that_is_told_to_end_says_that_it_goes_on() -> None:
    code = """
import os, signal, time
from unittest.mock import patch
from flows import cli
def at_work(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
with patch("flows.rebuild.rebuild", at_work):
    cli.app(["rebuild", "v1.0.0"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    told = "terminated; the same command goes on where this one stopped.\n"
    assert (done.returncode, done.stdout, done.stderr) == (143, "", told)
