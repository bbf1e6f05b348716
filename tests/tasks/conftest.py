"""A project folder of its own for each test, and stages that run in it as the flow runs them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).parents[2]
Stage = Callable[..., subprocess.CompletedProcess[str]]
Made = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder, which is the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project with a float model, for one module, which may change all but that."""

    def fill(folder: Path) -> None:
        tiny.write_params(folder)
        run_stages(folder, "train")

    return Path(shutil.copytree(made("trained", fill), tmp_path_factory.mktemp("trained") / "project"))


@pytest.fixture(scope="session")
def candidate(made: Made) -> Path:
    """A tiny project with a float and an INT8 model that nothing has measured yet. Nobody changes it; take a copy."""

    def fill(folder: Path) -> None:
        tiny.write_params(folder, **tiny.ALONE)
        run_stages(folder, "train", "quantize")

    return made("candidate", fill)


def run_stages(folder: Path, *names: str) -> None:
    tiny.write_shards(folder)
    for name in names:
        code, output = tiny.run(name, folder)
        assert code == 0, output


@pytest.fixture
def run_stage(project: Path) -> Stage:
    """Runs ``python -m tasks.NAME`` in the project; ``environment`` is added to the variables."""

    def run(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
        command = [sys.executable, "-m", f"tasks.{name}"]
        return subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def the_error() -> Callable[[subprocess.CompletedProcess[str]], str]:
    """Returns the one line that a user's mistake ends with, after checking that it is one and not a traceback."""

    def check(result: subprocess.CompletedProcess[str]) -> str:
        assert result.returncode == 2, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, result.stderr
        assert result.stderr.splitlines()[-1] == lines[0]
        assert "Traceback" not in result.stderr
        return lines[0]

    return check


@pytest.fixture
def write_params(project: Path) -> Callable[..., None]:
    """Writes ``params.yaml``: the repository's own, with sections' keys replaced."""

    def write(**sections: dict[str, Any]) -> None:
        content = YAML(typ="safe").load(REPOSITORY / "params.yaml")
        for name, keys in sections.items():
            content[name].update(keys)
        YAML(typ="safe").dump(content, project / "params.yaml")

    return write


@pytest.fixture
def write_jsonl() -> Callable[[Path, Iterable[object]], None]:
    """Writes rows as JSON lines."""

    def write(path: Path, rows: Iterable[object]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    return write
