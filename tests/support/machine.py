"""One machine of a training on many, as ``python -m tasks.train`` is; its processes note which windows they take."""

import json
import os
import time
from pathlib import Path
from typing import Any

from steps import on_each_step

from tasks import stage


def note_what_is_taken() -> None:
    """Appends ``[when, round, processes, rank, step, windows]`` to ``taken-PID`` after each step."""

    def note(run: Any, last: list[Any]) -> None:
        # Each round of the machines has a store of its own, at a port of its own.
        line = [time.time_ns(), os.environ["MASTER_PORT"], run.world.size, run.world.rank, *last]
        with Path(f"taken-{os.getpid()}").open("a") as taken:
            taken.write(json.dumps(line) + "\n")
        time.sleep(float(os.environ.get("SECONDS_A_STEP", "0")))

    on_each_step(note)


def run() -> None:
    """Is one machine, as the environment describes it."""
    from tasks.train import __main__ as train

    train.WORKER = "machine"
    stage.run(train.main)


if __name__ == "__main__":
    note_what_is_taken()
    from tasks.train import worker

    stage.run_rank(worker.main)
