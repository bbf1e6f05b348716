"""A small project with one registered version, for what has to do with versions and not with models.

Its two stages are cheap. ``MACHINE`` in the environment stands for other hardware: a number near 1 that ends up in the
outputs. ``REPORT`` names a file to which each stage appends the interpreter that ran it.
"""

import contextlib
import dataclasses
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from ruamel.yaml import YAML

from flows import environment
from flows.contents import Output, recorded
from flows.dvc import store

REPOSITORY = Path(__file__).parents[2]

STAGE = """
import json, os, pathlib, sys
stage = sys.argv[1]
if "REPORT" in os.environ:
    with open(os.environ["REPORT"], "a") as report:
        report.write(f"{stage} {sys.executable}\\n")
wait = pathlib.Path(os.environ.get("WAIT", "/nowhere"))
if stage == "measure" and wait.exists():
    import time
    time.sleep(60)
if stage == "work":
    texts = sorted(pathlib.Path("data/raw").rglob("*.txt"))
    place = pathlib.Path("out/work")
    place.mkdir(parents=True)
    (place / "text.txt").write_text("".join(text.read_text().upper() for text in texts))
    (place / "machine.txt").write_text(os.environ.get("MACHINE", "1"))
else:
    machine = float(pathlib.Path("out/work/machine.txt").read_text())
    pathlib.Path("out/measure.json").write_text(json.dumps({"loss": 2 * machine, "gate": {"passed": machine < 2}}))
"""

DAG = """
stages:
  work:
    cmd: python stage.py work
    deps: [data/raw, stage.py]
    outs: [out/work]
  measure:
    cmd: python stage.py measure
    deps: [out/work, stage.py]
    metrics: [out/measure.json]
"""


@dataclasses.dataclass(frozen=True)
class Said:
    """How a command ended, and what it said to whom."""

    code: int
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class Versioned:
    """The project at ``root``; ``lm@v1.0.0`` is its first commit. ``home`` stands in for the user's."""

    root: Path
    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "PYTHON", "GIT_"))}
        author = {f"GIT_{role}_{what}": "test@test" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        # A stage's command is `python`, which only an environment has everywhere.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        home = {"HOME": str(self.home), "DVC_SITE_CACHE_DIR": str(self.home), "PATH": path}
        return {**kept, **author, **home, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", **more}

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.root, env=self.environment(), text=True, capture_output=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def dvc(self, *arguments: str) -> None:
        """Does what the command ``dvc`` does, without a process that imports it."""
        from dvc.cli import main

        with contextlib.chdir(self.root), patch.dict(os.environ, self.environment(), clear=True):
            assert main(list(arguments)) == 0

    def commit(self, tag: str) -> None:
        """Commits all there is and registers it."""
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "--allow-empty", "-m", tag)
        self.run("git", "tag", "-a", tag, "-m", tag)

    def copy(self, root: Path) -> "Versioned":
        shutil.copytree(self.root, root, symlinks=True)
        return dataclasses.replace(self, root=root)

    def call(self, command: Callable[[Console, Console], int]) -> Said:
        """Runs a command of ours in this process, which has to be in the project's folder."""
        out, err = io.StringIO(), io.StringIO()
        code = command(Console(file=out, width=200), Console(file=err, width=200))
        return Said(code, out.getvalue(), err.getvalue())

    def output(self, path: str) -> Output:
        """What version 1 records for ``path``."""
        return next(one for one in recorded(self.root, "lm@v1.0.0") if str(one.path) == path)

    def cached(self, md5: str) -> Path:
        """Where the object lies in DVC's cache."""
        with store(self.root) as objects:
            return objects.path(md5)


def make(root: Path, home: Path) -> Versioned:
    """Makes the project, runs its stages, and registers version 1."""
    (root / "data/raw/deep").mkdir(parents=True)
    (root / "data/raw/a.txt").write_text("In the beginning.\n")
    (root / "data/raw/deep/b.txt").write_text("And there was light.\n")
    (root / "stage.py").write_text(STAGE)
    (root / "dvc.yaml").write_text(DAG)
    (root / "requirements.lock").write_text("ruamel.yaml==0\n")
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["tiny"]\n')
    (root / ".gitignore").write_text(".overnight/\n")
    yaml = YAML()
    content = yaml.load(REPOSITORY / "params.yaml")
    content["collect"]["sources"] = [{"name": "small", "uri": "source", "format": "txt", "licence": "none"}]
    yaml.dump(content, root / "params.yaml")
    made = Versioned(root, home)
    made.run("git", "init", "-q", "-b", "main")
    made.dvc("init", "-q")
    made.dvc("config", "core.analytics", "false")
    made.dvc("add", "-q", "data/raw")
    made.dvc("repro", "-q")
    environment.write(root)
    made.commit("lm@v1.0.0")
    return made
