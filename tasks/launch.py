"""Starts the processes of a distributed stage on this machine, and tells their failures in one line."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType

import psutil
import torch
from torch._C._distributed_c10d import TCPStore

from tasks import native, paths, stage, stopping
from tasks.errors import (
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    EXIT_TRY_AGAIN,
    EXIT_USER_MISTAKE,
    BadParameter,
    TryAgain,
)
from tasks.training_params import TrainingParams
from tasks.world import die_with_parent, tell_apart

# What ends a stage at once. SIGTERM is another matter: it leaves a checkpoint.
ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# Until a process that has not ended in ``stop_seconds`` is killed.
_SECONDS_TO_END = 10.0
# One that fails takes others along: which of them failed in the same moment.
_SECONDS_TOGETHER = 0.1


def worker_environment(threads: int) -> dict[str, str]:
    """Returns the environment variables of one training process. A level of torch's log that is set is left."""
    level = {name: value for name, value in os.environ.items() if name == "TORCH_CPP_LOG_LEVEL"}
    return {"OMP_NUM_THREADS": str(threads), **native.SETTINGS, **level}


def launch(module: str, params: TrainingParams) -> None:
    """Calls ``main`` of ``module`` in ``params.world_size`` processes and returns when all have ended well.

    They find in their environment what torchrun sets. On CPU they are forks of this one, so that it alone imports
    torch, which takes longer than many a step; CUDA works in no fork of a process that has asked for it.

    Raises :class:`TryAgain` when a process was killed, or was told to end by SIGTERM, which is passed on to all: see
    :mod:`tasks.stopping`. A process that met a user's mistake, or a fault that passes, has said so itself: this one
    ends with the same exit code, and with 128 + N when it is sent another signal N. Raises :class:`RuntimeError` when
    one failed otherwise, and has printed its traceback.
    """
    os.environ.update(worker_environment(params.threads_per_process))
    if params.device == "cpu":
        with stage.importing():
            importlib.import_module(module)
        start: type[BaseProcess] = multiprocessing.get_context("fork").Process
    else:
        start = multiprocessing.get_context("spawn").Process
    ranks: list[BaseProcess] = []
    with sigterm_passed_on() as told, ended_by_signals(), socket.create_server(("127.0.0.1", 0)) as listening:
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listening.getsockname()[1]),
            "WORLD_SIZE": str(params.world_size),
            "LOCAL_WORLD_SIZE": str(params.world_size),
            # The store is this process's: it has its port before there is anybody who would look for it.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        try:
            for rank in range(params.world_size):
                variables = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(start(target=_work, args=(module, variables, os.getpid())))
                with _signals_held():
                    ranks[-1].start()
            # Not before the forks: it has a thread.
            store = TCPStore(
                "127.0.0.1", listening.getsockname()[1], is_master=True, wait_for_workers=False,
                master_listen_fd=os.dup(listening.fileno()),
            )  # fmt: skip
            failed = _failed(ranks)
            del store
        finally:
            _end(ranks, seconds_to_stop(params))
    if failed:
        tell(failed, told.is_set())
        raise RuntimeError(f"of the processes of {module} failed, by rank, with exit code: {failed}; see above why")


def _work(module: str, variables: Mapping[str, str], launcher: int) -> None:
    die_with_parent(launcher)
    tell_apart(int(variables["RANK"]))
    # A terminal's Ctrl-C is for the launcher, which tells its workers.
    os.setsid()
    for number in (signal.SIGTERM, *ENDING):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.update(variables)
    stage.run_rank(importlib.import_module(module).main)


def _failed(ranks: Sequence[BaseProcess]) -> dict[int, int]:
    """Waits until all ``ranks`` have ended well, or one has not; returns the exit codes of those that have not."""
    running: dict[object, BaseProcess] = {rank.sentinel: rank for rank in ranks}
    while running:
        for sentinel in wait([rank.sentinel for rank in running.values()]):
            running.pop(sentinel).join()
        if any(rank.exitcode for rank in ranks):
            time.sleep(_SECONDS_TOGETHER)
            break
    return {number: rank.exitcode for number, rank in enumerate(ranks) if rank.exitcode}


def seconds_to_stop(params: TrainingParams) -> float:
    """Returns after how many seconds a process that is told to end is killed."""
    return params.stop_seconds + _SECONDS_TO_END


def _end(ranks: Sequence[BaseProcess], seconds: float) -> None:
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
        if rank.is_alive():
            rank.kill()
            rank.join()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    # A fork would answer to them as its parent does, until it has handlers of its own.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, *ENDING))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets the block be left, as by an exception, and the process end with 128 + N, when a signal N of ENDING comes."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_device(section: str, params: TrainingParams, processes: int | None = None) -> None:
    """Raises :class:`BadParameter` when this machine cannot give every process of ``section`` its device.

    ``processes`` are those on this machine; None: all of ``world_size``.
    """
    if params.device == "cpu":
        return
    needed, found = processes or params.world_size, torch.cuda.device_count()
    if found < needed:
        asked = f"{section}.world_size {needed}" if processes is None else f"{needed} processes are to run on a machine"
        raise BadParameter(
            f"{paths.PARAMS}: {section}.device is cuda and {asked}, but torch sees {found or 'no'} GPUs here. "
            + ("Lower world_size." if found else "Set device: cpu, or install a CUDA build (see README.md).")
        )


@contextlib.contextmanager
def sigterm_passed_on() -> Iterator[threading.Event]:
    """Passes SIGTERM on to the workers, and yields what is set when it came."""
    told = threading.Event()

    def pass_on(*_: object) -> None:
        told.set()
        workers = psutil.Process().children()
        if not workers:
            stopping.end_at_once()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def tell(codes: Mapping[int, int], told_to_end: bool) -> None:
    """Raises, or ends with, what the exit codes of the ranks mean; returns when it is a bug of ours."""
    for told in (EXIT_USER_MISTAKE, EXIT_TRY_AGAIN):
        if told in codes.values():
            sys.exit(told)
    if told_to_end or EXIT_STOPPED in codes.values():
        raise TryAgain("told to end (SIGTERM). Run again to go on from the last checkpoint.") from None
    for rank, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM:
            raise TryAgain(
                f"the process of rank {rank} was killed by {signal.Signals(-code).name} "
                "(SIGKILL is often the kernel, short of memory). Run again to go on from the last checkpoint."
            ) from None
    if set(codes.values()) == {EXIT_PEER_LOST}:
        raise TryAgain(
            "a process on another machine is gone, or the network to it. Run again to go on from the last checkpoint."
        ) from None
