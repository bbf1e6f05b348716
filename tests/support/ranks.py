"""A module whose ``main`` :func:`tasks.launch.launch` calls in tests: what each rank does, the variable ``DO`` says."""

import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from tasks import launch, stage
from tasks.training_params import TrainingParams


def start() -> None:
    """Launches two ranks, as ``python -m tasks.train`` does, on the device that the variable ``DEVICE`` names.

    Those that do not end are killed ``STOP_SECONDS`` after they were told to, and no later.
    """
    launch._SECONDS_TO_END = 0.0
    params = TrainingParams.model_construct(
        world_size=2,
        threads_per_process=1,
        device=os.environ["DEVICE"],
        stop_seconds=float(os.environ.get("STOP_SECONDS", "30")),
    )
    stage.run(lambda: launch.launch("ranks", params))


def main() -> None:
    rank = int(os.environ["RANK"])
    if os.environ["DO"] == "meet":
        dist.init_process_group("gloo")
        total = torch.tensor(rank + 1)
        dist.all_reduce(total)
        Path(f"rank-{rank}").write_text(f"{os.environ['LOCAL_RANK']} of {os.environ['WORLD_SIZE']}: {int(total)}")
        dist.destroy_process_group()
        return
    if rank == 0 and os.environ["DO"] == "fail deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(f"rank-{rank}").write_text(str(os.getpid()))
    if rank == 1 and os.environ["DO"].startswith("fail"):
        while not Path("rank-0").exists():
            threading.Event().wait(0.01)
        sys.exit(3)
    threading.Event().wait()
