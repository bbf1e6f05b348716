"""``python -m tasks.train``: checks everything that can be checked, then starts the training processes."""

import os
import signal
import sys

from tasks import native, stage, stopping

if __name__ == "__main__":
    # Before it takes the time to import torch.
    signal.signal(signal.SIGTERM, stopping.end_at_once)
    native.settle()
    stage.begin()

from tasks import compiled, paths
from tasks.errors import BadInput
from tasks.launch import check_device, launch
from tasks.section import read_section
from tasks.shards import Shards, SplitName, read_manifest
from tasks.train import communication, nodes, start
from tasks.train.params import TrainParams

WORKER = "tasks.train.worker"


def main() -> None:
    params = read_section("train", TrainParams)
    machines = nodes.asked(params, os.environ)
    if params.compile:
        compiled.check()
    check_device("train", params, machines.nproc_per_node if machines else None)
    native.settle_on(communication.environment_here(params.communication, params.device))
    manifest = read_manifest()
    manifest.check_tokenizer(paths.SHARDS)
    start.check(params, manifest)
    needs: dict[SplitName, int] = {"train": params.global_batch, "valid": 1}
    for split, needed in needs.items():
        found = len(Shards(paths.SHARDS, manifest, split).reader(params.seq_len))
        if found < needed:
            raise BadInput(
                f"{paths.SHARDS}: the {split} split holds {found} windows of seq_len {params.seq_len}, "
                f"and {needed} are needed. Collect more text, or lower train.seq_len or train.global_batch in "
                f"{paths.PARAMS}."
            )
    if told := communication.in_force(params.communication, os.environ):
        print(f"train     communication: {told}", file=sys.stderr, flush=True)
    if machines:
        nodes.launch_on(machines, WORKER, params.threads_per_process)
    else:
        launch(WORKER, params)


if __name__ == "__main__":
    stage.run(main)
