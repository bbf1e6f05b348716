"""A small project that makes versions: a model of a few bytes, a gate, and two folders as DVC's and Git's remotes."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ruamel.yaml import YAML

from flows import champion, contents, dvc, objects, registry, worktree
from flows.git import commit_of, git
from tasks import paths
from tasks.collect.collect import collect
from tasks.section import read_section
from tasks.sources import CollectParams

REPOSITORY = Path(__file__).parents[2]

# The model is the text; its loss is the learning rate. Above 0.5 the gate refuses it.
STAGE = """
import json, pathlib, sys
import ruamel.yaml
rate = ruamel.yaml.YAML(typ="safe").load(pathlib.Path("params.yaml"))["train"]["learning_rate"]
if sys.argv[1] == "model":
    text = "".join(file.read_text() for file in sorted(pathlib.Path("data/raw").rglob("*.txt")))
    folder = pathlib.Path("models/int8")
    (folder / "post_training").mkdir(parents=True, exist_ok=True)
    for name in ("model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "post_training/model.onnx"):
        (folder / name).write_text(f"{name} {rate}: {text}")
else:
    measured = json.loads(pathlib.Path("models/champion/champion.json").read_text())
    bits = {"value": rate, "low": rate, "high": rate}
    check = {"name": "against_champion", "passed": rate < 0.5, "reason": f"a loss of {rate}"}
    gate = {"passed": rate < 0.5, "checks": [check], "limit": 0.5, "relative_loss": bits}
    report = {"gate": gate, "models": {"int8": {"bits_per_byte": bits}}, "against": measured["version"]}
    pathlib.Path("models/evaluation.json").write_text(json.dumps(report))
"""

_DAG = """
stages:
  quantize:
    cmd: python stage.py model
    deps: [data/raw, stage.py]
    params: [train.learning_rate]
    outs: [models/int8]
  evaluate:
    cmd: python stage.py evaluate
    deps: [models/int8, models/champion, stage.py]
    params: [train.learning_rate]
    metrics: [models/evaluation.json]
"""


@dataclasses.dataclass(frozen=True)
class Clone:
    """One clone of the project; ``shared`` is the Git remote and ``shelf`` the DVC remote of all clones."""

    root: Path
    shared: Path
    shelf: Path

    @classmethod
    def within(cls, place: Path) -> "Clone":
        """The project of :func:`make` below ``place``."""
        return cls(place / "project", place / "shared.git", place / "shelf")

    def write(self, name: str, text: str) -> None:
        """Brings a text, as ``collect`` would."""
        (self.root / "data/raw").mkdir(parents=True, exist_ok=True)
        (self.root / "data/raw" / name).write_text(text)

    def collect(self) -> None:
        """Copies what is new at the sources, where there are any."""
        with contextlib.chdir(self.root):
            collect(read_section("collect", CollectParams))

    def run(self) -> None:
        """Does what a run does after that: the data, the champion, the stages."""
        from dvc.repo import Repo

        os.chdir(self.root)
        with patch.dict(os.environ, dvc.environment(os.environ)), Repo(str(self.root)) as repo:
            repo.add("data/raw")
            if self._champion() != str(champion.current(self.root).commit):
                champion.bring(self.root)
                repo.add("models/champion")
            repo.reproduce()

    def dvc(self, *arguments: str) -> None:
        """Does what the command ``dvc`` does, without a process that imports it."""
        from dvc.cli import main

        with contextlib.chdir(self.root), patch.dict(os.environ, dvc.environment(os.environ)):
            assert main(list(arguments)) == 0

    def commit(self, message: str = "Edits") -> str:
        """Commits everything, as a person does."""
        git(self.root, "add", "--all")
        git(self.root, "commit", "-q", "-m", message, environment=registry.author(self.root))
        return commit_of(self.root, "HEAD")

    def commit_empty(self) -> str:
        """Commits no change at all."""
        git(self.root, "commit", "-q", "--allow-empty", "-m", "-", environment=registry.author(self.root))
        return commit_of(self.root, "HEAD")

    def set(self, section: str, key: str, value: object) -> None:
        yaml = YAML()
        content = yaml.load(self.root / "params.yaml")
        content[section][key] = value
        yaml.dump(content, self.root / "params.yaml")

    def evaluation(self) -> dict[str, Any]:
        return dict(json.loads((self.root / paths.EVALUATION).read_text()))

    def clone(self, name: str) -> "Clone":
        """A clone on another machine: its own cache, the same remotes."""
        root = self.root.with_name(name)
        git(self.root, "clone", "-q", str(self.shared), str(root))
        return dataclasses.replace(self, root=root)

    def copy(self, place: Path) -> "Clone":
        """The project and its remotes as they are now, somewhere else."""
        shutil.copytree(self.root.parent, place, symlinks=True)
        made = Clone(place / self.root.name, place / self.shared.name, place / self.shelf.name)
        git(made.root, "remote", "set-url", "origin", str(made.shared))
        return made

    def tags(self) -> list[str]:
        """The registry's tags at the Git remote."""
        return git(self.shared, "for-each-ref", "--format=%(refname:strip=2)", "refs/tags").split()

    def check_remote(self) -> None:
        """Fails when a version at the Git remote has an object that the DVC remote lacks."""
        for version in registry.versions(self.shared):
            git(self.root, "fetch", "-q", "origin", version.commit)
            with dvc.store(self.root) as store:
                outputs = contents.recorded(self.root, version.commit)
                assert {str(output.path) for output in outputs} == {
                    "data/raw", "models/champion", "models/int8", "models/evaluation.json"
                }  # fmt: skip
                assert store.lacking(objects.needed(store, outputs, {})) == set()

    def _champion(self) -> str:
        record = self.root / paths.CHAMPION_RECORD
        return str(json.loads(record.read_text())["commit"]) if record.is_file() else "lost"


def make(place: Path) -> Clone:
    """Makes the project below ``place``, committed, with one run done and nothing published."""
    from dvc.repo import Repo

    project = Clone.within(place)
    project.root.mkdir(parents=True)
    git(place, "init", "-q", "--bare", "-b", "main", str(project.shared))
    git(project.root, "init", "-q", "-b", "main")
    git(project.root, "remote", "add", "origin", str(project.shared))
    os.chdir(project.root)
    Repo.init(".").close()
    settings = "[core]\n    remote = shelf\n['remote \"shelf\"']\n    url = ../../shelf\n"
    (project.root / ".dvc/config").write_text(settings)
    (project.root / ".gitignore").write_text(".overnight/\n")
    (project.root / "stage.py").write_text(STAGE)
    (project.root / "dvc.yaml").write_text(_DAG)
    (project.root / "requirements.lock").write_text("")
    yaml = YAML()
    content = yaml.load(REPOSITORY / "params.yaml")
    content["train"]["learning_rate"] = 0.25
    content["flow"].update(retries={}, retry_delay_seconds=0.0)
    content["publish"] = {"git_remote": "origin", "retries": 1}
    yaml.dump(content, project.root / "params.yaml")
    project.commit("The project")
    git(project.root, "push", "-q", "origin", "main")
    project.write("a.txt", "In the beginning.\n")
    project.run()
    return project


def collecting(place: Path) -> Clone:
    """Makes the project, which collects the folder ``texts``; nothing but the project itself is committed or pushed."""
    with contextlib.chdir(Path.cwd()):
        clone = make(place)
    yaml = YAML()
    content = yaml.load(clone.root / "params.yaml")
    content["collect"]["sources"] = [{"name": "small", "uri": "texts", "format": "txt", "licence": "none"}]
    yaml.dump(content, clone.root / "params.yaml")
    (clone.root / "texts").mkdir()
    # What it was made with is no version of what it collects.
    shutil.rmtree(clone.root / "data/raw")
    (clone.root / "data/raw.dvc").unlink()
    git(clone.root, "commit", "-q", "-m", "Sources", "--", "params.yaml", environment=registry.author(clone.root))
    git(clone.root, "push", "-q", "origin", "main")
    return clone


def nightly(publisher: Clone, name: str, text: str) -> Clone:
    """A night's worktree in which a run has been done."""
    place = worktree.add(publisher.root, name, "HEAD")
    night = Clone(place, publisher.shared, publisher.shelf)
    night.write(f"{name}.txt", text)
    night.run()
    return night
