"""A small project with Git, DVC, the real ``params.yaml``, and cheap stages whose behaviour files decide."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).parents[2]

# Each stage appends its name to `ran`, does what the file `NAME.do` says, and copies its input to its output.
STAGE = """
import os, pathlib, subprocess, sys, time
name, source, target = sys.argv[1:]
with open("ran", "a") as ran:
    ran.write(name + "\\n")
todo = pathlib.Path(name + ".do")
if todo.exists():
    exec(todo.read_text())
target = pathlib.Path(target)
target.parent.mkdir(parents=True, exist_ok=True)
if pathlib.Path(source).is_dir():
    text = "".join(file.read_text() for file in sorted(pathlib.Path(source).rglob("*")) if file.is_file())
else:
    text = pathlib.Path(source).read_text()
if target.suffix == ".json":
    import json
    text = json.dumps({"letters": len(text)})
target.write_text(text)
"""

DAG = """
stages:
  first:
    desc: Read what was collected.
    cmd: python stage.py first data/raw out/first.txt
    deps: [data/raw, stage.py]
    params: [ingest.max_reject_rate]
    outs: [out/first.txt]
  second:
    desc: Work on it.
    cmd: python stage.py second out/first.txt out/second.txt
    deps: [out/first.txt, stage.py]
    params: [train.learning_rate]
    outs: [out/second.txt]
  third:
    desc: Report on it.
    cmd: python stage.py third out/second.txt out/third.json
    deps: [out/second.txt, stage.py]
    metrics: [out/third.json]
"""


@dataclasses.dataclass(frozen=True)
class Project:
    """The small project, and the ways in which a test acts on it."""

    root: Path

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OVERNIGHT_"))}
        # A home of its own: neither the settings of who runs the tests nor their home take part.
        return {**kept, "PYTHONPATH": str(REPOSITORY), "HOME": str(self.root.parent), "COLUMNS": "160", **more}

    def start(self, *arguments: str, **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "flows", *arguments],
            cwd=self.root,
            env=self.environment(**more),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def overnight(self, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def dvc(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "dvc", *arguments], cwd=self.root, env=self.environment(), check=True, text=True,
            capture_output=True,
        )  # fmt: skip

    def ran(self) -> list[str]:
        """The stages whose commands have run since the last call."""
        file = self.root / "ran"
        names = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return names

    def set(self, section: str, key: str, value: object) -> None:
        yaml = YAML()
        content = yaml.load(self.root / "params.yaml")
        content[section][key] = value
        yaml.dump(content, self.root / "params.yaml")

    def do(self, stage: str, code: str) -> None:
        """Makes ``stage`` run ``code`` before it writes its output."""
        (self.root / f"{stage}.do").write_text(textwrap.dedent(code))

    def processes(self) -> list[psutil.Process]:
        """Every living process whose current directory is in the project, but for the one that runs the tests."""
        others = (process for process in psutil.process_iter() if process.pid != os.getpid())
        return [process for process in others if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return Path(process.cwd()).is_relative_to(self.root)
        except psutil.Error:
            return False


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    root = tmp_path / "project"
    (root / "source").mkdir(parents=True)
    # DVC would leave processes behind that report its use and look for a newer version.
    settings = tmp_path / ".config" / "dvc" / "config"
    settings.parent.mkdir(parents=True)
    settings.write_text("[core]\n    analytics = false\n    check_update = false\n")
    (root / "source" / "a.txt").write_text("In the beginning.\n")
    (root / "stage.py").write_text(STAGE)
    (root / "dvc.yaml").write_text(DAG)
    yaml = YAML()
    content = yaml.load(REPOSITORY / "params.yaml")
    content["collect"]["sources"] = [{"name": "small", "uri": "source", "format": "txt", "licence": "none"}]
    content["flow"] = {"retries": {"second": 1}, "retry_delay_seconds": 0.0}
    yaml.dump(content, root / "params.yaml")
    made = Project(root)
    monkeypatch.chdir(root)
    subprocess.run(["git", "init", "-q"], cwd=root, env=made.environment(), check=True)
    made.dvc("init", "-q")
    yield made
    left = made.processes()
    for process in left:
        process.kill()
    assert not left, f"left behind: {left}"
