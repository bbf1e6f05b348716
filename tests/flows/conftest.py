"""A small project with Git, DVC, the real ``params.yaml``, and cheap stages whose behaviour files decide."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import command
import psutil
import publishing
import pytest
from processes import left_within, within
from publishing import Clone
from ruamel.yaml import YAML
from serving import lay_out_project
from versioned import Versioned, make

from flows.publish import publish

REPOSITORY = Path(__file__).parents[2]
Made = Callable[[str, Callable[[Path], object]], Path]

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
        # A home of its own: neither the settings of who runs the tests nor their home take part.
        return command.surroundings(self.root.parent, **{"PYTHONPATH": str(REPOSITORY), **more})

    def start(self, *arguments: str, **more: str) -> "subprocess.Popen[str]":
        return command.start(self.root, self.environment(**more), arguments)

    def overnight(self, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

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
        return within(self.root)


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small project in which nothing has run, and a home beside it. Nobody changes it; a test takes a copy."""
    from dvc.repo import Repo

    home = tmp_path_factory.mktemp("blank")
    root = home / "project"
    (root / "source").mkdir(parents=True)
    # DVC would leave processes behind that report its use and look for a newer version.
    settings = home / ".config" / "dvc" / "config"
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
    subprocess.run(["git", "init", "-q"], cwd=root, env=Project(root).environment(), check=True)
    with contextlib.chdir(root):
        Repo.init(".").close()
    return home


@pytest.fixture
def project(blank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A copy of the small project, and its folder as the current one."""
    shutil.copytree(blank, tmp_path, dirs_exist_ok=True)
    root = tmp_path / "project"
    monkeypatch.chdir(root)
    yield Project(root)
    left = left_within(root)
    for process in left:
        process.kill()
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def version_one(made: Made) -> Versioned:
    """A small project with one version. Nobody changes it; a test takes a copy."""

    def fill(folder: Path) -> None:
        (folder / "home").mkdir()
        make(folder / "project", folder / "home")

    place = made("versioned", fill)
    return Versioned(place / "project", place / "home")


@pytest.fixture
def versioned(tmp_path: Path, version_one: Versioned, monkeypatch: pytest.MonkeyPatch) -> Versioned:
    """A copy of the small project with one version, and its folder as the current one."""
    copied = version_one.copy(tmp_path / "versioned")
    for name, value in copied.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(copied.root)
    return copied


@pytest.fixture(scope="session")
def unpublished(made: Made) -> Clone:
    """A small project with two remotes, in which one run was done. Nobody changes it; a test takes a copy."""
    return Clone.within(made("unpublished", publishing.make))


@pytest.fixture
def publisher(tmp_path: Path, unpublished: Clone, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """A copy of the project with two remotes, and its folder as the current one; Git knows no name of a user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    made = unpublished.copy(tmp_path / "place")
    monkeypatch.chdir(made.root)
    return made


@pytest.fixture(scope="session")
def published_twice(made: Made, unpublished: Clone) -> Clone:
    """The project after v1.0.0, which is in production, and v1.1.0, which the gate refused. Nobody changes it."""

    def fill(folder: Path) -> None:
        clone = unpublished.copy(folder / "place")
        os.chdir(clone.root)
        publish(clone.root)
        clone.set("train", "learning_rate", 0.75)
        clone.write("b.txt", "And the second.\n")
        clone.commit("A bolder rate")
        clone.run()
        publish(clone.root)

    return Clone.within(made("published", fill) / "place")


@pytest.fixture
def published(tmp_path: Path, published_twice: Clone, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """A copy of the project after v1.0.0 and the refused v1.1.0, and its folder as the current one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    made = published_twice.copy(tmp_path / "place")
    monkeypatch.chdir(made.root)
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an INT8 model whose tokens are bytes, for what serves it."""
    # It imports torch, which other tests here do without.
    from odd import export_over_bytes

    root = lay_out_project(tmp_path_factory.mktemp("project"))
    export_over_bytes(root / "models/int8")
    return root
