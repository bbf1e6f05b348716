"""Training processes that cost a fork and not an import of torch, for tests that start them many times."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tasks.train.worker"])


def _nothing() -> None:
    pass


def start(folders: Sequence[Path], log: Path, prepare: Callable[[], None] = _nothing) -> list[BaseProcess]:
    """Starts one rank of ``tasks.train`` in each of ``folders``, which may be the same, as torchrun would.

    Each calls ``prepare``, a function of a module, first; what they print is appended to ``log``.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [(folder, rank, len(folders), port, log, prepare) for rank, folder in enumerate(folders)]
    ranks = [_CONTEXT.Process(target=_work, args=one) for one in arguments]
    for rank in ranks:
        rank.start()
    return ranks


def end(ranks: Sequence[BaseProcess], seconds: float = 60.0) -> list[int | None]:
    """Returns the exit codes of ``ranks``, None for one that does not end in time."""
    for rank in ranks:
        rank.join(seconds)
    return [rank.exitcode for rank in ranks]


def _work(folder: Path, rank: int, size: int, port: int, log: Path, prepare: Callable[[], None]) -> None:
    os.chdir(folder)
    with log.open("ab") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in where.items()})
    prepare()
    from tasks import stage
    from tasks.train import worker

    stage.run(worker.main)
