"""Training on many machines: each runs the same command, and torchrun's elastic agents find each other, and again.

The machines are described by torchrun's own environment variables (``PET_`` and the name of its option: ``PET_NNODES``,
``PET_RDZV_ENDPOINT``, ``PET_NPROC_PER_NODE``, ``PET_MAX_RESTARTS``, ``PET_RDZV_CONF``), which Kubeflow sets as well.
They say where a training runs and not what it is, so ``params.yaml`` has none of them.
"""

import contextlib
import dataclasses
import io
import logging
import math
import os
import sys
import threading
from collections.abc import Mapping

import torch.distributed.run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous
from torch.distributed.launcher.api import LaunchConfig

from tasks import paths
from tasks.errors import EXIT_STOPPED, EXIT_USER_MISTAKE, BadParameter, TryAgain
from tasks.launch import ENDING, seconds_to_stop, sigterm_passed_on, tell, worker_environment
from tasks.train.communication import address_here
from tasks.train.params import TrainParams


def asked(params: TrainParams, variables: Mapping[str, str]) -> LaunchConfig | None:
    """Returns what ``variables`` ask torchrun for, or None where they ask for this machine alone.

    Raises :class:`BadParameter` when ``params`` cannot be trained on each number of machines that may come together.
    """
    if variables.get("PET_NNODES", "1") in ("1", "1:1"):
        return None
    if not variables.get("PET_RDZV_ENDPOINT"):
        raise BadParameter("PET_NNODES asks for several machines. Set PET_RDZV_ENDPOINT to HOST:PORT of the first one.")
    config = _parsed()
    least, most = config.min_nodes, config.max_nodes
    if least < most and not params.elastic:
        raise BadParameter(
            f"{paths.PARAMS}: PET_NNODES is {least}:{most}, and train.elastic is false. "
            "Set it to true, or ask for one number of machines."
        )
    if "PET_NPROC_PER_NODE" not in variables:
        if params.world_size % most:
            raise BadParameter(
                f"{paths.PARAMS}: train.world_size {params.world_size} does not divide over {most} machines. "
                "Make it a multiple, or set PET_NPROC_PER_NODE."
            )
        config.nproc_per_node = params.world_size // most
    if "PET_SHUTDOWN_TIMEOUT" not in variables:
        config.shutdown_timeout = math.ceil(seconds_to_stop(params))
    _check_every_number(params, config)
    config.local_addr = config.local_addr or address_here(params.communication)
    return config


def launch_on(config: LaunchConfig, module: str, threads: int) -> None:
    """Runs ``python -m module`` in this machine's share of the processes and returns when all have ended well.

    A machine that is lost, or is told to end, leaves the others to go on from the last checkpoint; being told uses up
    none of ``config.max_restarts``. Raises :class:`TryAgain` when this machine is told, when too few are left or the
    first one is gone, and otherwise as :func:`tasks.launch.launch` does.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.update(worker_environment(threads))
    # Not SIGTERM: torch's answer would be to end, and to leave the workers half a minute for it.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in ENDING)
    # The agents' own store is where the first round had it (torch 2.13): those that remain look for it on the machine
    # that is gone. Without, each round's first process keeps one.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with sigterm_passed_on() as told:
        try:
            _run(config, module, told)
        except ChildFailedError as error:
            tell({rank: failure.exitcode for rank, failure in error.failures.items()}, told.is_set())
            raise
        except SignalException as error:
            sys.exit(128 + error.sigval)
        except RendezvousError as error:
            raise TryAgain(
                f"the machines do not find each other at {config.rdzv_endpoint}: the first one is gone, too few are "
                f"left, or another program has the port ({_reason(error)}). Run again on all to go on from the last "
                "checkpoint."
            ) from None


def _reason(error: RendezvousError) -> str:
    """Returns the first line of what ``error`` came from; below it torch prints its own stack."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__).rstrip(".")


class _Agent(LocalElasticAgent):
    """torchrun's agent, which knows what the exit codes of our workers mean."""

    def __init__(self, spec: WorkerSpec, config: LaunchConfig, told: threading.Event) -> None:
        super().__init__(
            spec=spec,
            logs_specs=config.logs_specs,  # type: ignore[arg-type]
            start_method=config.start_method,
            shutdown_timeout=config.shutdown_timeout,  # type: ignore[arg-type]
        )
        self._told = told

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if not result.is_failed():
            return result
        codes = {failure.exitcode for failure in result.failures.values()}
        if self._told.is_set() or EXIT_USER_MISTAKE in codes:
            self._remaining_restarts = 0
        elif codes == {EXIT_STOPPED}:
            self._remaining_restarts += 1
        if self._remaining_restarts:
            print(
                "warning: a process or a machine is gone; waiting for those that are left", file=sys.stderr, flush=True
            )
        return result


def _run(config: LaunchConfig, module: str, told: threading.Event) -> None:
    # As torch's launch_agent does, but for the agent, and for who closes the rendezvous.
    handler = rendezvous.get_rendezvous_handler(
        RendezvousParameters(
            backend=config.rdzv_backend,
            endpoint=config.rdzv_endpoint,
            run_id=config.run_id,
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            local_addr=config.local_addr,
            **config.rdzv_configs,
        )
    )
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=sys.executable,
        args=("-m", module),
        rdzv_handler=handler,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
    )
    try:
        result = _Agent(spec, config, told).run()
        # None: there were enough machines without this one, and they have finished.
        if result is not None and result.is_failed():
            raise ChildFailedError(name=module, failures=result.failures)
    except SignalException:
        told.set()
        raise
    finally:
        # Closed, it is closed for all: who is told to end leaves the others to go on.
        if not told.is_set():
            handler.shutdown()


def _parsed() -> LaunchConfig:
    """Returns what the variables of torchrun say; its parser takes each as the default of its option."""
    faults = io.StringIO()
    try:
        with contextlib.redirect_stderr(faults):
            arguments = torchrun.get_args_parser().parse_args(["--module", "worker"])
            if "PET_RDZV_BACKEND" not in os.environ:
                arguments.rdzv_backend = "c10d"
            # What processes say goes to this one's output; torchrun would leave a folder for it after each training.
            arguments.log_dir = arguments.log_dir or os.devnull
            config, _, _ = torchrun.config_from_args(arguments)
    except (SystemExit, ValueError, RuntimeError, AssertionError) as error:
        lines = faults.getvalue().splitlines() or [str(error)]
        raise BadParameter(f"torchrun does not take its variables PET_...: {lines[-1]}. Mend that one.") from None
    return dataclasses.replace(config, run_id="overnight" if config.run_id == "none" else config.run_id)


def _check_every_number(params: TrainParams, config: LaunchConfig) -> None:
    machines = range(config.min_nodes, config.max_nodes + 1)
    for number in machines:
        try:
            params.on(number * config.nproc_per_node)
        except BadParameter as error:
            fits = params.micro_batch * config.nproc_per_node * math.lcm(*machines)
            raise BadParameter(
                f"{error} So it is with {number} of {config.min_nodes}:{config.max_nodes} machines (PET_NNODES); "
                f"a global_batch that is a multiple of {fits} divides over each number of them."
            ) from None
