"""Training against transformers' Trainer and litgpt: one model, the same precision, processes, threads, batch, tokens.

Each side runs under torchrun in processes of its own; what counts is the median step from its sixth one on. Ours runs
the loop of the stage `train` with the environment that the stage gives its processes. On CPUs the Trainer runs once
with the environment that a user finds, and once with ours; on GPUs both sides run once as they are, once compiled.
litgpt (`litgpt pretrain`, which compiles the model) knows no mixture of DeepSeek's kind, trains on one GPU here, and on
a CPU in one process, which gets the threads and the windows of all. It is installed beside the locked packages:
python -m pip install --target litgpt --no-deps litgpt==0.5.13 lightning==2.6.6 pytorch-lightning==2.6.6
lightning-utilities==0.15.3 torchmetrics==1.9.0 jsonargparse==4.53.0 docstring-parser==0.18.0 typeshed-client==2.15.0
importlib-resources==7.1.0, and found with PYTHONPATH=litgpt.

Utilization is that of active parameters (six operations each a token, attention's own products left out) against a
square product of random bf16 numbers, timed in the same run.
Run: .venv/bin/python benchmarks/train.py
     .venv/bin/python benchmarks/train.py --shape dense-9m    (or mixture-30m)
     python benchmarks/train.py --device cuda --shape dense-350m    (or mixture-1b)
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import numpy as np
import torch
from pairs import compare
from train_peers import PEERS, TOKENS, WARM_UP, Stopwatch

from lm import hugging_face
from lm.config import Architecture, GroupedArchitecture, LatentArchitecture, completed
from lm.model import LanguageModel
from tasks.checkpoints import Checkpoints
from tasks.heartbeat import Heartbeat
from tasks.launch import worker_environment
from tasks.process import Process
from tasks.progress import Progress
from tasks.section import read_section
from tasks.shards import WindowReader, Windows
from tasks.step_meter import active_in_products
from tasks.train.params import TrainParams
from tasks.training import train

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Shape:
    """A model, and the windows it is trained on; without an architecture it is the project's own."""

    vocabulary: int
    architecture: Architecture | None = None
    seq_len: int = 2048
    micro_batch: int = 16


# fmt: off
SHAPES = {
    "default": Shape(2048),
    # 9 million parameters.
    "dense-9m": Shape(
        2048,
        GroupedArchitecture(
            model_type="llama", hidden_size=320, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=5,
            head_dim=64, rope_theta=10_000.0, rope_scaling=None, intermediate_size=864, tie_word_embeddings=False,
            initializer_range=0.02, rms_norm_eps=1e-6,
        ),
        seq_len=256, micro_batch=8,
    ),
    # 30 million parameters; routed as DeepSeek-V2-Lite is: of 64 experts a token takes six, and two that all share.
    "mixture-30m": Shape(
        2048,
        LatentArchitecture(
            model_type="deepseek_v3", hidden_size=256, num_hidden_layers=4, num_attention_heads=4, q_lora_rank=None,
            kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=48, rope_theta=10_000.0,
            intermediate_size=1376, first_k_dense_replace=1, moe_intermediate_size=176, n_routed_experts=64,
            n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1, norm_topk_prob=True,
            routed_scaling_factor=1.0, initializer_range=0.02, rms_norm_eps=1e-6,
        ),
        seq_len=256, micro_batch=8,
    ),
    # 360 million parameters: GPT-3 Medium's depth and width, with heads as wide as those of Llama 3 and Qwen3.
    "dense-350m": Shape(
        50_304,
        GroupedArchitecture(
            model_type="llama", hidden_size=1024, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8,
            head_dim=128, rope_theta=10_000.0, rope_scaling=None, intermediate_size=2816, tie_word_embeddings=True,
            initializer_range=0.02, rms_norm_eps=1e-6,
        ),
    ),
    # 1,046 million, of which 246 million multiply each token.
    "mixture-1b": Shape(
        50_304,
        LatentArchitecture(
            model_type="deepseek_v3", hidden_size=1024, num_hidden_layers=18, num_attention_heads=8, q_lora_rank=None,
            kv_lora_rank=256, qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=128, rope_theta=10_000.0,
            intermediate_size=2816, first_k_dense_replace=1, moe_intermediate_size=512, n_routed_experts=32,
            n_shared_experts=1, num_experts_per_tok=4, n_group=1, topk_group=1, norm_topk_prob=True,
            routed_scaling_factor=1.0, initializer_range=0.02, rms_norm_eps=1e-6,
        ),
    ),
}
# fmt: on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="timed a run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="default")
    parser.add_argument("--micro-batch", type=int, help="windows that a process takes at a time")
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="the sides to run; 'overnight' always does")
    parser.add_argument("--side", choices=["ours", *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    params = parameters(arguments)
    if arguments.side:
        run_side(arguments, params)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        operations = write_model(params, SHAPES[arguments.shape].vocabulary, folder)
        ours = worker_environment(params.threads_per_process)
        plain = {"OMP_NUM_THREADS": str(params.threads_per_process)}
        notes: dict[str, object] = {"shape": arguments.shape, "micro_batch": params.micro_batch}
        peak = 0.0
        if arguments.device == "cuda":
            peak = product_peak()
            notes |= {"device": torch.cuda.get_device_name(), "product_tflops": round(peak / 1e12, 1)}
        print(notes, flush=True)

        def side(name: str, kind: str, environment: Mapping[str, str], compiled: bool = False) -> Callable[[], float]:
            def run() -> float:
                found = measure(kind, folder, arguments, params, environment, compiled)
                notes[f"{name}: peak MiB"] = round(found["bytes"] / 2**20)
                if peak:
                    notes[f"{name}: utilization"] = round(operations * found["rate"] / peak / params.world_size, 4)
                print(f"{name}: {found}", flush=True)
                return found["rate"]

            return run

        sides = {"overnight": side("overnight", "ours", ours)}
        if arguments.device == "cpu":
            for name, environment in (("transformers Trainer", plain), ("transformers Trainer, our environment", ours)):
                sides[name] = side(name, "trainer", environment)
        else:
            sides["overnight, compiled"] = side("overnight, compiled", "ours", ours, compiled=True)
            for name, compiled in (("transformers Trainer", False), ("transformers Trainer, compiled", True)):
                sides[name] = side(name, "trainer", plain, compiled)
        alone = params.device == "cpu" or params.world_size == 1
        if alone and isinstance(params.model, GroupedArchitecture) and importlib.util.find_spec("litgpt"):
            every = {"OMP_NUM_THREADS": str(params.world_size * params.threads_per_process)}
            sides["litgpt"] = side("litgpt", "litgpt", plain if peak else every)
        if unknown := set(arguments.only or ()) - set(sides):
            parser.error(f"--only {', '.join(unknown)}: no such side here; there are {', '.join(sides)}")
        kept = {name: run for name, run in sides.items() if name == "overnight" or name in (arguments.only or sides)}
        compare(kept, arguments.rounds, "tokens/s", {"transformers Trainer": 2.0}, "overnight", notes)


def parameters(arguments: argparse.Namespace) -> TrainParams:
    """Returns the parameters of the project with the shape, and without validations and checkpoints in between."""
    params = read_section("train", TrainParams, ROOT / "params.yaml")
    shape = SHAPES[arguments.shape]
    if shape.architecture is not None:
        more = {"model": shape.architecture, "seq_len": shape.seq_len, "micro_batch": shape.micro_batch}
        params = params.model_copy(update=more)
    if arguments.micro_batch:
        params = params.model_copy(update={"micro_batch": arguments.micro_batch})
    processes = params.world_size
    if arguments.device == "cuda":
        processes = max(1, torch.cuda.device_count())
    if arguments.device == "cuda" or shape.architecture is not None:
        params = params.model_copy(update={"world_size": processes, "global_batch": params.micro_batch * processes})
    total = arguments.steps + WARM_UP
    return params.model_copy(
        update={
            "device": arguments.device, "steps": total, "validate_every": 10**9, "checkpoint_every": 10**9,
            "compile": arguments.compile,
        }
    )  # fmt: skip


def write_model(params: TrainParams, vocabulary: int, folder: Path) -> int:
    """Writes one random model in the layout that both sides read; returns its operations a token."""
    assert params.model is not None
    config = completed(
        params.model,
        vocab_size=vocabulary,
        max_position_embeddings=params.seq_len,
        bos_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 1,
    )
    model = LanguageModel(config)
    model.initialize(params.seed)
    checkpoint.save(model, folder / "model")
    return 6 * active_in_products(model)


def product_peak() -> float:
    """Returns the operations a second of a bf16 product of random numbers [8192, 8192], the median of 20."""
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(25):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        x @ y
        last.record()
        last.synchronize()
        seconds.append(first.elapsed_time(last) / 1000)
    return 2 * 8192**3 / statistics.median(seconds[5:])


def measure(
    kind: str,
    folder: Path,
    arguments: argparse.Namespace,
    params: TrainParams,
    environment: Mapping[str, str],
    compiled: bool,
) -> dict[str, float]:
    """Runs one side in processes of its own; returns tokens a second over all, and the first one's peak of memory."""
    processes = 1 if kind == "litgpt" and params.device == "cpu" else params.world_size
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        __file__, "--side", kind, "--folder", str(folder), "--steps", str(arguments.steps),
        "--device", params.device, "--shape", arguments.shape, "--micro-batch", str(params.micro_batch),
        *(["--compile"] if compiled else []),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        sys.exit(f"the side '{kind}' failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads((folder / "rate.json").read_text())
    return found


def run_side(arguments: argparse.Namespace, params: TrainParams) -> None:
    """One process of one side; the first one leaves the rate and its memory in ``arguments.folder``."""
    if arguments.side == "litgpt" and params.device == "cpu":
        threads = params.world_size * params.threads_per_process
        whole = {"world_size": 1, "threads_per_process": threads, "micro_batch": params.global_batch}
        params = params.model_copy(update=whole)
    torch.set_num_threads(params.threads_per_process)
    run = run_ours if arguments.side == "ours" else PEERS[arguments.side]
    seconds = run(params, SHAPES[arguments.shape].vocabulary, arguments.folder)
    if os.environ["RANK"] == "0":
        rate = params.global_batch * params.seq_len / seconds
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held = torch.cuda.max_memory_allocated() if params.device == "cuda" else resident
        (arguments.folder / "rate.json").write_text(json.dumps({"rate": rate, "bytes": held}))


class _TimedProgress(Progress, Stopwatch):
    def __init__(self) -> None:
        Stopwatch.__init__(self)

    def begin(self, step: str, done: float = 0) -> None: ...

    def update(self, done: float, total: float, unit: str, **numbers: float) -> None:
        self.ends.append(time.perf_counter())


def run_ours(params: TrainParams, vocabulary: int, folder: Path) -> float:
    from tasks import world

    model = hugging_face.load(folder / "model")
    tokens = np.random.default_rng(0).integers(0, vocabulary, TOKENS, dtype=np.uint16)
    reader = WindowReader([tokens], params.seq_len)
    few = WindowReader([tokens[: 8 * params.seq_len]], params.seq_len)
    stopwatch = _TimedProgress()
    os.chdir(folder)
    with world.joined(params) as here:
        checkpoints = Checkpoints("train", f"benchmark-{os.environ['TORCHELASTIC_RUN_ID']}", kept=1, root=folder)
        process = Process("benchmark", here, stopwatch, Heartbeat())
        train(model, params, Windows(reader, few), process, checkpoints)
    # The last step's end comes after a validation and a checkpoint, which are no part of a step.
    stopwatch.ends.pop()
    return stopwatch.seconds()


if __name__ == "__main__":
    main()
