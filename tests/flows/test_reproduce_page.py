"""The commands of docs/reproduce.md do what the page says."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import page

from flows.certificate import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE, SHARE, SHARE_TOLERANCE, UNJUDGED

if TYPE_CHECKING:
    from versioned import Versioned

OWN_ENVIRONMENT = "--environment"


def test_every_command_can_be_pasted(versioned: "Versioned", tmp_path: Path) -> None:
    # An environment of its own is made in minutes: test_rebuild.py runs this command for a small one.
    commands = [line for line in page.lines("reproduce") if OWN_ENVIRONMENT not in line]
    assert len(commands) == 5
    shim = tmp_path / "bin/overnight"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m flows "$@"\n')
    shim.chmod(0o755)
    path = f"{shim.parent}:{versioned.environment()['PATH']}"
    said = {}
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=versioned.root, env=versioned.environment(PATH=path), text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}"
        said[command] = done.stdout
    assert (versioned.root.parent / "release-1/out/measure.json").is_file()
    assert said["cat .overnight/certificates/v1.0.0.md"].startswith("# Rebuild of lm@v1.0.0: identical")
    assert '"lock_sha256"' in said["git show lm@v1.0.0:environment.json"]


def test_it_names_the_tolerance() -> None:
    assert f"within {RELATIVE_TOLERANCE:.0%}, or {ABSOLUTE_TOLERANCE} near zero" in page.read("reproduce")
    assert f"`{SHARE}`) may differ by {SHARE_TOLERANCE}" in page.read("reproduce")
    assert f"`{UNJUDGED}`) is told and" in page.read("reproduce")
