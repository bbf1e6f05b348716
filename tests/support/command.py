"""The command ``overnight`` as a process, in surroundings that no setting from outside reaches."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE

import psutil


def surroundings(home: Path, **more: str) -> dict[str, str]:
    """Returns the environment of a command: ``home`` stands in for the user's, and ``more`` is set."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "OVERNIGHT_", "PYTHON", "DVC_"))
    }
    # Else each command of DVC leaves a process behind that wants to tell its makers of it.
    return {**kept, "HOME": str(home), "COLUMNS": "200", "DVC_NO_ANALYTICS": "1", **more}


def start(root: Path, environment: Mapping[str, str], arguments: tuple[str, ...]) -> psutil.Popen:
    """Starts ``overnight ARGUMENTS`` in the folder ``root``."""
    command = [sys.executable, "-m", "flows", *arguments]
    return psutil.Popen(command, cwd=root, env=dict(environment), text=True, stdout=PIPE, stderr=PIPE)
