"""Training against transformers' Trainer: one model, the same precision, processes, threads, batch and tokens.

Each side runs under torchrun in processes of its own; what counts is the median step from its sixth one on. Ours runs
the loop of the stage `train` with the environment that the stage gives its processes; the Trainer runs once with the
environment that a user finds, and once with ours.
Run: .venv/bin/python benchmarks/train.py
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pairs import compare

from lm import hugging_face
from lm.config import LatentConfig
from lm.model import LanguageModel
from tasks.launch import worker_environment
from tasks.progress import Progress
from tasks.section import read_section
from tasks.shards import WindowReader
from tasks.train.params import TrainParams
from tasks.training import train

ROOT = Path(__file__).parent.parent
WARM_UP = 5
VOCAB = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="timed a run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--side", choices=["ours", "trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.folder, arguments.steps, arguments.device)
        return
    params = parameters(arguments.device, arguments.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(params, folder)
        ours = worker_environment(params.threads_per_process)
        plain = {"OMP_NUM_THREADS": str(params.threads_per_process)}

        def side(kind: str, environment: Mapping[str, str]) -> float:
            return measure(kind, folder, params, arguments.steps, environment)

        compare(
            {
                "overnight": lambda: side("ours", ours),
                "transformers Trainer": lambda: side("trainer", plain),
                "transformers Trainer, our environment": lambda: side("trainer", ours),
            },
            arguments.rounds,
            "tokens/s",
            {"transformers Trainer": 1.5},
            "overnight",
        )


def parameters(device: str, steps: int) -> TrainParams:
    """Returns the default parameters of the project, without validations and checkpoints in between."""
    params = read_section("train", TrainParams, ROOT / "params.yaml")
    if device == "cuda":
        processes = max(1, torch.cuda.device_count())
        params = params.model_copy(update={"world_size": processes, "global_batch": params.micro_batch * processes})
    total = steps + WARM_UP
    return params.model_copy(
        update={"device": device, "steps": total, "validate_every": 10**9, "checkpoint_every": 10**9}
    )


def write_model(params: TrainParams, folder: Path) -> None:
    """Writes one random model, in the layout that both sides read."""
    config = LatentConfig(
        **params.model.model_dump(),
        vocab_size=VOCAB,
        max_position_embeddings=params.seq_len,
        bos_token_id=VOCAB - 1,
        eos_token_id=VOCAB - 1,
    )
    model = LanguageModel(config)
    model.initialize(params.seed)
    tokenizer = folder / "added.json"
    tokenizer.write_text(json.dumps({"added_tokens": [{"id": VOCAB - 1, "content": "<|endoftext|>"}]}))
    (folder / "model").mkdir()
    hugging_face.save(model, tokenizer, folder / "model")


def measure(kind: str, folder: Path, params: TrainParams, steps: int, environment: Mapping[str, str]) -> float:
    """Runs one side in processes of its own; returns tokens a second over all of them."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={params.world_size}",
        __file__, "--side", kind, "--folder", str(folder), "--steps", str(steps), "--device", params.device,
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        sys.exit(f"the side '{kind}' failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return float(json.loads((folder / "rate.json").read_text()))


def run_side(kind: str, folder: Path, steps: int, device: str) -> None:
    """One process of one side; the first one leaves the rate in ``folder``."""
    params = parameters(device, steps)
    torch.set_num_threads(params.threads_per_process)
    seconds = run_ours(params, folder) if kind == "ours" else run_trainer(params, folder)
    if os.environ["RANK"] == "0":
        rate = params.global_batch * params.seq_len / seconds
        (folder / "rate.json").write_text(json.dumps(rate))


class Stopwatch:
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def seconds(self) -> float:
        """Seconds of the median step after the warm-up: neighbours on the machine slow single steps down threefold."""
        ends = self.ends[WARM_UP - 1 :]
        return statistics.median(after - before for before, after in itertools.pairwise(ends))


class _TimedProgress(Progress, Stopwatch):
    def __init__(self) -> None:
        Stopwatch.__init__(self)

    def begin(self, step: str, done: float = 0) -> None: ...

    def update(self, done: float, total: float, unit: str, **numbers: float) -> None:
        self.ends.append(time.perf_counter())


class _NoCheckpoints:
    def load_latest(self, at_most: int | None = None, part: int = 0) -> None:
        return None

    def save(self, step: int, state: object, part: int = 0) -> None: ...

    def finish(self) -> None: ...


def run_ours(params: TrainParams, folder: Path) -> float:
    from tasks import world

    model = hugging_face.load(folder / "model")
    tokens = np.random.default_rng(0).integers(0, VOCAB, 2**20, dtype=np.uint16)
    reader = WindowReader([tokens], params.seq_len)
    few = WindowReader([tokens[: 8 * params.seq_len]], params.seq_len)
    stopwatch = _TimedProgress()
    os.chdir(folder)
    with world.joined(params) as here:
        train(model, params, reader, few, _NoCheckpoints(), here, stopwatch, "benchmark")  # type: ignore[arg-type]
    # The last step's end comes after a validation, which is no part of a step.
    stopwatch.ends.pop()
    return stopwatch.seconds()


def run_trainer(params: TrainParams, folder: Path) -> float:
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from tasks.world import resolve_precision

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokens = np.random.default_rng(0).integers(0, VOCAB, 2**20, dtype=np.int64)
    stopwatch = Stopwatch()

    class Timed(TrainerCallback):
        def on_step_end(self, *arguments: object, **more: object) -> None:
            stopwatch.ends.append(time.perf_counter())

    class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(tokens) // params.seq_len

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            window = torch.from_numpy(tokens[index * params.seq_len : (index + 1) * params.seq_len])
            return {"input_ids": window, "labels": window}

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=params.steps,
            per_device_train_batch_size=params.micro_batch,
            gradient_accumulation_steps=params.global_batch // (params.micro_batch * params.world_size),
            learning_rate=params.learning_rate,
            weight_decay=params.weight_decay,
            max_grad_norm=params.clip_grad_norm,
            bf16=resolve_precision(params) == "bf16",
            use_cpu=params.device == "cpu",
            ddp_backend="gloo" if params.device == "cpu" else "nccl",
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Windows(),
        callbacks=[Timed()],
    )
    trainer.train()
    return stopwatch.seconds()


if __name__ == "__main__":
    main()
