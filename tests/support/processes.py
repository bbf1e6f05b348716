"""Which processes are left."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

from flows import lock

# A program that leaves a file "up", and four seconds after it is told to end (SIGTERM) a file "left".
ENDS_SLOWLY = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(4)
    pathlib.Path("left").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
pathlib.Path("up").touch()
time.sleep(600)
"""


def alive(process: psutil.Process) -> bool:
    """Whether ``process`` still works: it has neither gone, which it may do at any moment, nor is it a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def within(folder: Path) -> list[psutil.Process]:
    """Every living process but this one whose current directory is at or below ``folder``."""
    return [one for one in psutil.process_iter() if one.pid != os.getpid() and _is_within(one, folder)]


def left_within(folder: Path) -> list[psutil.Process]:
    """Those that have not ended 5 seconds later: what ends with a run may still be at it where cores are few."""
    return list(filter(alive, psutil.wait_procs(within(folder), timeout=5)[1]))


def _is_within(process: psutil.Process, folder: Path) -> bool:
    try:
        return alive(process) and Path(process.cwd()).is_relative_to(folder)
    except psutil.Error:
        return False


def leave_lock(folder: Path, seconds: float, file: Path = lock.LOCK) -> None:
    """Has a process take a lock of the project in ``folder`` and die; a child of it lives on for ``seconds``."""
    code = f"""
import os, pathlib, subprocess, sys
from flows import lock
with lock.hold(pathlib.Path({str(folder)!r}), "dead", file=pathlib.Path({str(file)!r})) as descriptor:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep({seconds})"], pass_fds=[descriptor])
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
