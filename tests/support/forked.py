"""Stages and training processes that cost a fork and not an import of torch, for tests that start them many times."""

import faulthandler
import multiprocessing
import os
import runpy
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

_SUPPORT = Path(__file__).parent
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("tasks.train.worker", "tasks.quantize.worker", "tasks.evaluate.__main__"),
        # What those import where they need it.
        *("torch.utils.tensorboard", "numpy.ma"),
    ]
)


def nothing() -> None:
    pass


def start(
    folders: Sequence[Path], log: Path, prepare: Callable[[], None] = nothing, **environment: str
) -> list[BaseProcess]:
    """Starts one rank of ``tasks.train`` in each of ``folders``, which may be the same, as torchrun would.

    Each calls ``prepare``, a function of a module in ``tests/support``, first; what they print is appended to ``log``.
    """
    port = free_port()
    arguments = [(folder, rank, len(folders), port, log, prepare, environment) for rank, folder in enumerate(folders)]
    return [_started(_work, *one) for one in arguments]


def call(function: Callable[[], None], folder: Path, log: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Starts a process that calls ``function``, of a module in ``tests/support``, in ``folder``."""
    return _started(_call, function, folder, log, environment)


def together(function: Callable[[], None], processes: int, folder: Path) -> None:
    """Calls ``function``, of a module in ``tests/support``, in so many processes, which torchrun's variables name."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    log = folder / "log"
    ranks = [call(function, folder, log, {**place, "RANK": str(rank)}) for rank in range(processes)]
    assert end(ranks, 900) == [0] * processes, log.read_text()


def stage(
    name: str, folder: Path, log: Path, environment: Mapping[str, str], prepare: Callable[[], None] = nothing
) -> BaseProcess:
    """Starts what ``python -m tasks.NAME`` does, in ``folder``, with no other environment; it prints to ``log``.

    It calls ``prepare``, a function of a module in ``tests/support``, first; what that changes holds for its ranks too.
    """
    return _started(_stage, name, folder, log, environment, prepare)


def end(ranks: Sequence[BaseProcess], seconds: float = 240.0) -> list[int | None]:
    """Returns the exit codes of ``ranks``; one that does not end in time is killed, its stacks in the log."""
    for rank in ranks:
        rank.join(seconds)
        if rank.is_alive() and rank.pid is not None:
            os.kill(rank.pid, signal.SIGABRT)
            rank.join()
    return [rank.exitcode for rank in ranks]


def _started(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    with pytest.MonkeyPatch.context() as patch:
        # The server imports what it preloads with its own sys.path, which is not this process's before Python 3.13: in
        # another folder it would find what is installed.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(_SUPPORT.parents[1]), str(_SUPPORT)]), prepend=os.pathsep)
        forkserver.ensure_running()
    process = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def _work(
    folder: Path,
    rank: int,
    size: int,
    port: int,
    log: Path,
    prepare: Callable[[], None],
    environment: Mapping[str, str],
) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    _settle(folder, log, {name: str(value) for name, value in {**where, **environment}.items()})
    prepare()
    from tasks import stage
    from tasks.train import worker

    stage.run_rank(worker.main)


def _stage(name: str, folder: Path, log: Path, environment: Mapping[str, str], prepare: Callable[[], None]) -> None:
    os.environ.clear()
    # With settings of its own it would not start anew to have them.
    _settle(folder, log, {"GLIBC_TUNABLES": "", **environment})
    prepare()
    runpy.run_module(f"tasks.{name}", run_name="__main__", alter_sys=True)


def _call(function: Callable[[], None], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
    _settle(folder, log, environment)
    function()


def _settle(folder: Path, log: Path, environment: Mapping[str, str]) -> None:
    os.chdir(folder)
    with log.open("ab") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
    faulthandler.enable()
    os.environ.update(environment)
