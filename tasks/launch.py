"""Starts the processes of a distributed stage with torchrun's elastic agent, and tells its failures in one line."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

import psutil
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tasks import paths
from tasks.errors import (
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    EXIT_TRY_AGAIN,
    EXIT_USER_MISTAKE,
    BadParameter,
    TryAgain,
)
from tasks.training_params import TrainingParams

# SIGTERM is ours: torch's answer would be to end, and to leave the workers half a minute for it.
SIGNALS_TO_HANDLE = "SIGINT,SIGHUP,SIGQUIT"
# Blocks that autograd's thread frees go to an arena of its own, and glibc gives large ones back to the system, which
# faults them in again the next step. One arena that keeps what it has, in huge pages, took the default model from 3,350
# to 5,000 tokens a second on one core.
_KEEP_MEMORY = ":".join(
    [
        "glibc.malloc.arena_max=1",
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_max=0",
        "glibc.malloc.trim_threshold=1099511627776",
        "glibc.malloc.top_pad=67108864",
    ]
)


def worker_environment(threads: int) -> dict[str, str]:
    """Returns the environment variables of one training process."""
    return {"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": _KEEP_MEMORY, "TORCH_CPP_LOG_LEVEL": "ERROR"}


def launch(module: str, world_size: int, threads: int) -> None:
    """Runs ``python -m module`` in ``world_size`` processes of this machine and returns when all have ended well.

    Raises :class:`TryAgain` when a process was killed, or was told to end by SIGTERM, which is passed on to all: see
    :mod:`tasks.stopping`. A process that met a user's mistake, or a fault that passes, has said so itself: this one
    ends with the same exit code, and with 128 + N when it is sent another signal N. Anything else surfaces as torch's
    ChildFailedError.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id="overnight",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle=SIGNALS_TO_HANDLE,
    )
    os.environ.update(worker_environment(threads))
    try:
        with sigterm_passed_on() as told:
            elastic_launch(config, sys.executable)("-m", module)
    except ChildFailedError as error:
        tell(error, told.is_set())
        raise
    except SignalException as error:
        # The agent, which has ended its workers; a process without one would have died of it without a word.
        sys.exit(128 + error.sigval)


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
            f"{paths.PARAMS}: {section}.device is cuda and {asked}, but torch sees {found} GPUs "
            "here. Lower world_size, set device: cpu, or install a CUDA build (see README.md)."
        )


@contextlib.contextmanager
def sigterm_passed_on() -> Iterator[threading.Event]:
    """Passes SIGTERM on to the workers, and yields what is set when it came."""
    told = threading.Event()

    def pass_on(*_: object) -> None:
        told.set()
        workers = psutil.Process().children()
        if not workers:
            raise TryAgain("told to end (SIGTERM) before any process had started. Run again.")
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def tell(error: ChildFailedError, told_to_end: bool) -> None:
    """Raises, or ends with, what the exit codes of the workers mean; returns when it is a bug of ours."""
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
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
