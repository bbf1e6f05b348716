"""The commands of docs/versions.md, one after the other, in a project with a champion and a refused version."""

import os
import re
import subprocess
import sys
from pathlib import Path

import page
from publishing import REPOSITORY, Clone

from flows import registry


def test_a_colleague_s_environment_is_set_up_without_a_run() -> None:
    (target,) = re.findall(r"`make ?(\w*)`", page.read("versions"))
    command = ["make", "--dry-run", "--always-make", *filter(None, [target])]
    planned = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "pip install" in planned
    assert "overnight run" not in planned


def test_its_commands_can_be_pasted(published: Clone) -> None:
    # As an installation has it: the programs beside the interpreter, the packages from anywhere.
    programs = {"overnight": [sys.executable, "-m", "flows"], "dvc": [sys.executable, "-m", "dvc"]}
    programs["gto"] = [str(Path(sys.executable).with_name("gto"))]
    said = {}
    for command in [command for block in page.blocks("versions") for command in block]:
        done = subprocess.run(
            [*programs.get(command[0], command[:1]), *command[1:]],
            cwd=published.root,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        said[" ".join(command[:2])] = done.stdout
    assert "v1.1.0" in said["overnight publish"]
    assert [line.split()[0] for line in said["overnight versions"].splitlines()[-2:]] == ["v1.1.0", "v1.0.0"]
    assert "learning_rate" in said["overnight diff"]
    assert "lm#prod#1" in said["git tag"]
    assert "v1.1.0" in said["gto show"]
    assert "bits_per_byte" in said["dvc metrics"]
    assert "v1.1.0" in said["overnight promote"]
    assert "v1.0.0" in said["overnight rollback"]
    assert said["overnight prune"]
    champion = registry.champion(published.root)
    assert champion is not None
    assert champion.name == "v1.0.0"
