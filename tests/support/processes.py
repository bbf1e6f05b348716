"""Which processes are left."""

import os
from pathlib import Path

import psutil


def alive(process: psutil.Process) -> bool:
    """Whether ``process`` still works: it has neither gone, which it may do at any moment, nor is it a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def within(folder: Path) -> list[psutil.Process]:
    """Every living process but this one whose current directory is at or below ``folder``."""
    return [one for one in psutil.process_iter() if one.pid != os.getpid() and _is_within(one, folder)]


def _is_within(process: psutil.Process, folder: Path) -> bool:
    try:
        return alive(process) and Path(process.cwd()).is_relative_to(folder)
    except psutil.Error:
        return False
