"""What each process of a cut model holds from its start to the end: the whole model, or its part of it.

A random checkpoint in bf16 is laid over a mesh and written as fp32, without a step in between. One side is the plain
way: every process reads the model, keeps its part, and in the end puts it together again (``full_tensor``), for the
first one to write. The other side is what ``train`` does. Memory is what a process has for itself (RssAnon), looked at
a hundred times a second; pages of the checkpoint's files are the kernel's.
Run: .venv/bin/python benchmarks/memory.py
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import checkpoint
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from lm import hugging_face
from lm.config import GroupedConfig, GroupedMixtureConfig, ModelConfig
from lm.model import LanguageModel
from lm.weights import Whole, reads
from tasks.launch import worker_environment
from tasks.mesh import MeshParams
from tasks.parallel.parallelize import parallelize
from tasks.parallel.whole import whole as whole_of
from tasks.world import World, device_mesh

_ANY = {
    "vocab_size": 32_000, "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "rope_theta": 1e6, "rope_scaling": None, "rms_norm_eps": 1e-6,
    "initializer_range": 0.02, "tie_word_embeddings": False, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, ModelConfig] = {
    "dense": GroupedConfig.model_validate({**_ANY, "model_type": "qwen3", "intermediate_size": 3584}),
    "mixture": GroupedMixtureConfig.model_validate(
        {
            **_ANY, "model_type": "qwen3_moe", "moe_intermediate_size": 512, "num_experts": 16,
            "num_experts_per_tok": 2, "norm_topk_prob": True,
        }
    ),
}  # fmt: skip
SIDES = ("whole", "parts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--axis", choices=("shard", "expert", "tensor"), default="shard")
    parser.add_argument("--model", choices=CONFIGS, default="mixture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, MeshParams(**{arguments.axis: arguments.processes}))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_checkpoint(CONFIGS[arguments.model], folder / "checkpoint")
        print(f"{arguments.model}, {parameters / 1e6:,.0f} M parameters, {arguments.processes} processes", flush=True)
        for _ in range(arguments.rounds):
            for side in SIDES:
                found[side].append(measured(side, arguments, folder))
                told = {key: round(value, 2) for key, value in found[side][-1].items()}
                print(f"{side:<8}{told}", flush=True)
        first, second = (sorted((folder / side).glob("*.safetensors")) for side in SIDES)
        same = [one.read_bytes() == other.read_bytes() for one, other in zip(first, second, strict=True)]
    results: dict[str, object] = {"parameters": parameters, "processes": arguments.processes, "axis": arguments.axis}
    for key in found["whole"][0]:
        ratios = [whole[key] / part[key] for whole, part in zip(*found.values(), strict=True)]
        results[f"whole / parts, {key}"] = round(statistics.median(ratios), 3)
    results["same bytes"] = all(same)
    print(json.dumps(results))


def write_checkpoint(config: ModelConfig, folder: Path) -> int:
    model = LanguageModel(config)
    model.initialize(1)
    checkpoint.save(model, folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    return sum(parameter.numel() for parameter in model.parameters())


def measured(side: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / side).mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--side", side, "--axis", arguments.axis]
    processes = []
    for rank in range(arguments.processes):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        place["WORLD_SIZE"] = str(arguments.processes)
        environment = {**os.environ, **worker_environment(1), **place}
        command_of_all = [*command, "--processes", str(arguments.processes)]
        processes.append(subprocess.Popen(command_of_all, cwd=folder, env=environment))
    if any([process.wait() for process in processes]):
        sys.exit(f"error: a process of the side {side} failed; see above why")
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(arguments.processes)]
    return {
        "MiB of all, to start": sum(own["mib to start"] for own in told),
        "MiB of all, to write": sum(own["mib to write"] for own in told),
        "most MiB of a process": max(max(own["mib to start"], own["mib to write"]) for own in told),
        "seconds to start": max(own["start"] for own in told),
        "seconds to write": max(own["write"] for own in told),
    }


class Watch:
    """Looks at the memory of this process, until :meth:`end`."""

    def __init__(self) -> None:
        self._most, self._first, self._ended = 0, _anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self._most = max(self._most, _anonymous())

    def most(self) -> float:
        """Returns by how much it was more than in the beginning, at most, in MiB; from now on looks anew."""
        most, self._most = self._most, 0
        return (most - self._first) / 1024

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])


def run_side(side: str, mesh: MeshParams) -> None:
    """One process of one side."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    world = World(rank, size, device, "fp32", device_mesh(mesh.over(size), device))
    watch, began = Watch(), time.perf_counter()
    model, weights = hugging_face.opened(Path("checkpoint"))
    if side == "whole":
        held = hugging_face.load(Path("checkpoint"))
        weights = ((name, reads(value)) for name, value in held.state_dict().items())
    parallel = parallelize(model, world, weights)
    if side == "whole":
        del held, weights
    dist.barrier()
    started, mib = time.perf_counter(), watch.most()
    whole: Whole = parallel.whole
    if side == "whole":
        state = {name: whole_of(value) for name, value in parallel.model.state_dict().items()}
        whole = state.__getitem__
    if side == "parts" or world.is_first:
        hugging_face.save_weights(model.config, whole, Path(side) if world.is_first else None)
    dist.barrier()
    ended = time.perf_counter()
    told = {"mib to start": mib, "mib to write": watch.most(), "start": started - began, "write": ended - started}
    watch.end()
    Path(f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
