"""Text from the quantized graphs against onnxruntime in fp32 and transformers: ``python benchmarks/decode.py``.

Two shapes with random weights, since speed does not depend on what they hold: SmolLM2-135M's (Llama: 30 layers, 576
wide), and the default model's scaled to 90 million parameters (latent attention, mixture of experts). A prefill of 512
tokens, then 64 tokens one by one, batch 1, two threads. Each measurement is a process of its own, in turns; ratios are
taken round by round. The last line is one JSON object.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

PREFILL, DECODE, WARM_UP = 512, 64, 4
THREADS = 2
YARDSTICK = "transformers fp32"

_COMMON = {"initializer_range": 0.02, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
SHAPES = {
    "SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "rope_theta": 100000.0, "rope_scaling": None,
        "intermediate_size": 1536, "tie_word_embeddings": True, "vocab_size": 49152, **_COMMON, **_TOKENS,
    },
    "default, 90M": {
        "model_type": "deepseek_v3", "hidden_size": 640, "num_hidden_layers": 8, "num_attention_heads": 10,
        "q_lora_rank": None, "kv_lora_rank": 128, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64,
        "rope_theta": 10000.0, "intermediate_size": 1728, "first_k_dense_replace": 1, "moe_intermediate_size": 432,
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "vocab_size": 8192, **_COMMON, **_TOKENS,
    },
}  # fmt: skip
SIDES = {"dynamic, qat": "per-token-8", "weight-only-8": "blockwise-8", "weight-only-4": "blockwise-4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments.folder)))
        return
    result = {shape: compare(shape, arguments.rounds) for shape in SHAPES}
    print(json.dumps({"rounds": arguments.rounds, "threads": THREADS, **result}))


def compare(shape: str, rounds: int) -> dict[str, dict[str, float]]:
    """Measures all sides in turns and prints a table; returns the medians, and the ratios to the yardstick."""
    sides = [*SIDES, "onnxruntime fp32", YARDSTICK]
    with tempfile.TemporaryDirectory() as name:
        sizes = {side: write(shape, side, Path(name) / side) for side in sides}
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for turn in range(rounds):
            for side in sides:
                found[side].append(measure(side, Path(name) / side))
            print(f"{shape}: round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
    print(f"\n{shape}, {THREADS} threads, medians of {rounds} rounds")
    print(f"{'':<18} {'decode':>9} {'prefill':>9} {'peak':>7} {'files':>7}   times {YARDSTICK}: decode, prefill")
    table: dict[str, dict[str, float]] = {}
    for side in sides:
        row = {key: statistics.median(one[key] for one in found[side]) for key in found[side][0]}
        for key in ("decode", "prefill"):
            ratios = [one[key] / other[key] for one, other in zip(found[side], found[YARDSTICK], strict=True)]
            row[f"{key} / {YARDSTICK}"] = round(statistics.median(ratios), 3)
            row[f"{key}: least ratio"] = round(min(ratios), 3)
        row["files"] = sizes[side]
        table[side] = row
        print(
            f"{side:<18} {row['decode']:7.1f}/s {row['prefill']:7.0f}/s {row['peak']:4.0f} MB {row['files']:4.0f} MB   "
            f"{row[f'decode / {YARDSTICK}']:5.2f} {row[f'prefill / {YARDSTICK}']:5.2f}"
        )
    return table


def write(shape: str, side: str, folder: Path) -> float:
    """Writes the model as ``side`` reads it; returns the size of its files in MB."""
    import tiny
    from pydantic import TypeAdapter

    from lm import hugging_face, hugging_face_config, onnx_model
    from lm.config import ModelConfig
    from lm.model import LanguageModel
    from lm.quantization import PLANS, Plan
    from lm.scheme import Float

    folder.mkdir()
    model = LanguageModel(TypeAdapter(ModelConfig).validate_python(SHAPES[shape]))
    model.initialize(0)
    if side == YARDSTICK:
        tokenizer = folder / "tokens.json"
        tokenizer.write_text(json.dumps({"added_tokens": [{"id": 0, "content": "<|endoftext|>"}]}))
        hugging_face.save(model, tokenizer, folder)
    else:
        plan = PLANS[SIDES[side]] if side in SIDES else Plan(Float(), Float())
        onnx_model.export(model, plan, folder / "model.onnx")
        tiny.write_tokenizer(folder / "tokenizer.json")
        (folder / "config.json").write_text(json.dumps(hugging_face_config.config_to_json(model.config)))
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def measure(side: str, folder: Path) -> dict[str, float]:
    """Runs ``side`` in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_side(side: str, folder: Path) -> dict[str, float]:
    """Returns tokens a second of prefill and decode, and the process's peak memory in MB."""
    step = _transformers(folder) if side == YARDSTICK else _graph(folder)
    ids = np.random.default_rng(0).integers(1, 8000, size=PREFILL)
    # The first call of each shape pays for buffers and kernels.
    step(ids, True)
    started = time.perf_counter()
    token = step(ids, True)
    prefill = time.perf_counter() - started
    for _ in range(WARM_UP):
        token = step(np.array([token]), False)
    started = time.perf_counter()
    for _ in range(DECODE):
        token = step(np.array([token]), False)
    decode = time.perf_counter() - started
    # Not getrusage, whose maximum is inherited from whoever started this process.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]
    return {"decode": DECODE / decode, "prefill": PREFILL / prefill, "peak": peak}


Step = Callable[[np.ndarray, bool], int]


def _graph(folder: Path) -> Step:
    from lm.runtime import Generator

    generator = Generator(folder, THREADS)
    cache = generator.new_cache()

    def step(ids: np.ndarray, anew: bool) -> int:
        nonlocal cache
        if anew:
            cache = generator.new_cache()
        return int(generator.run(ids[None].astype(np.int64), cache, last=True)[0, 0].argmax())

    return step


def _transformers(folder: Path) -> Step:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    past = None

    @torch.inference_mode()
    def step(ids: np.ndarray, anew: bool) -> int:
        nonlocal past
        # As `generate` asks for them: the last token's logits alone.
        found = model(
            torch.from_numpy(ids[None]), past_key_values=None if anew else past, use_cache=True, logits_to_keep=1
        )
        past = found.past_key_values
        return int(found.logits[0, -1].argmax())

    return step


if __name__ == "__main__":
    main()
