"""A checkpoint of a whole model beside torch.distributed.checkpoint, with one process: time and memory, there and back.

The state is what training keeps of the parameters in fp32: them and AdamW's two moments. Ours copies it, so that
training can go on, writes it with torch.distributed.checkpoint and its digest, and checks that before it reads and
behind that. torch's is copied and written as it is (``save`` of what its stager has copied), and read unchecked. Both
are read into tensors that are there, and synced to the disk. Memory is what the process has for itself (RssAnon) beside
the state, at most; of reading, all that it has.
Run: .venv/bin/python benchmarks/save_load.py
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from memory import Watch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tasks.checkpoints import Checkpoints, Snapshot
from tasks.parallel import parts

OURS, TORCH = "overnight", "torch.distributed.checkpoint"
SIDES = (OURS, TORCH)
# Each has 2^20 parameters.
KEYS = ("model", "exp_avg", "exp_avg_sq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=int, default=128, help="parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        (read if arguments.read else write)(arguments.side, arguments.million, arguments.folder)
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            found[side].append(measured(side, arguments.million))
            print(f"{side:<30}{found[side][-1]}", flush=True)
    results: dict[str, object] = {"million parameters": arguments.million, "rounds": arguments.rounds}
    for key in found[OURS][0]:
        results[key] = {side: statistics.median(one[key] for one in found[side]) for side in SIDES}
        ratios = [theirs[key] / max(ours[key], 0.01) for ours, theirs in zip(*found.values(), strict=True)]
        results[f"{TORCH} / {OURS}, {key}"] = round(statistics.median(ratios), 2)
    print(json.dumps(results))


def measured(side: str, million: int) -> dict[str, float]:
    told: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for how in ([], ["--read"]):
            command = [sys.executable, __file__, "--side", side, "--million", str(million), "--folder", folder, *how]
            told |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return told


def write(side: str, million: int, folder: Path) -> None:
    """Makes a state and writes it; prints how long that took and what it took beside the state."""
    state = {f"{key}.{number}": torch.randn(2**10, 2**10) for key in KEYS for number in range(million)}
    watch, began = Watch(), time.perf_counter()
    if side == OURS:
        checkpoints = Checkpoints("train", "inputs", kept=2, root=folder)
        checkpoints.save(1, Snapshot({"step": 1}, tensors=state))
        checkpoints.finish()
    else:
        warnings.simplefilter("ignore")
        save(parts.staged(state), storage_writer=FileSystemWriter(folder / "torch", per_thread_copy_ahead=0))
    seconds = time.perf_counter() - began
    watch.end()
    print(json.dumps({"seconds to write": round(seconds, 2), "MiB to write": round(watch.most())}))


def read(side: str, million: int, folder: Path) -> None:
    """Reads what :func:`write` has written."""
    watch, began = Watch(), time.perf_counter()
    state = {f"{key}.{number}": torch.empty(2**10, 2**10) for key in KEYS for number in range(million)}
    if side == OURS:
        checkpoints = Checkpoints("train", "inputs", kept=2, root=folder)
        loaded = checkpoints.load_latest()
        assert loaded is not None
        with checkpoints.confirmed(loaded):
            parts.read(state, loaded["parts"].folder)
    else:
        warnings.simplefilter("ignore")
        load(state, storage_reader=FileSystemReader(folder / "torch"))
    seconds = time.perf_counter() - began
    watch.end()
    print(json.dumps({"seconds to read": round(seconds, 2), "MiB to read": round(watch.most())}))


if __name__ == "__main__":
    main()
