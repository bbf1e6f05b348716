"""Text from the quantized graphs against what people would use instead: ``python benchmarks/decode.py``.

Three shapes with random weights, since speed does not depend on what they hold: SmolLM2-135M's (Llama: 30 layers, 576
wide), the default model's scaled to 90 million parameters (latent attention, 2 of 8 experts), and one with 6 of 64
experts, as DeepSeek-V2-Lite has them. A prefill of 512 tokens, then 64 tokens one by one; and 64 tokens of 8 texts side
by side after 64 tokens each; two threads. Each measurement is a process of its own, in turns; ratios are taken round by
round. Where it says so, our threads spin while they wait, as `--spin` has it and as llama.cpp's and onnxruntime-genai's
do. ``standard`` is the same graph as `export --type standard` writes it; in ``small pages`` lie weights that nobody has
moved (:mod:`lm.huge_pages`). The roof is how often a second memory can be
read for what one token needs: the active weights and the cache. The last line is one JSON object.
"""

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import peers

if TYPE_CHECKING:
    from lm.config import ModelConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Last: what is installed goes before a test support of the same name.
sys.path.append(str(ROOT / "tests/support"))

PREFILL, DECODE, WARM_UP = 512, 64, 4
BATCH, BATCH_PREFILL = 8, 64
MOST_TOKENS = PREFILL + 2 * DECODE + WARM_UP
THREADS = 2

_COMMON = {"initializer_range": 0.02, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024}
WORDS = 330
_TOKENS = {"bos_token_id": WORDS - 1, "eos_token_id": WORDS - 1}
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
    "64 experts, 300M": {
        "model_type": "deepseek_v2", "hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12,
        "q_lora_rank": None, "kv_lora_rank": 128, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64,
        "rope_theta": 10000.0, "intermediate_size": 2048, "first_k_dense_replace": 1, "moe_intermediate_size": 256,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "vocab_size": 8192, **_COMMON, **_TOKENS,
    },
}  # fmt: skip
SPINNING = ", spinning"
OURS = {
    f"{name}{how}": plan
    for name, plan in {
        "per token, 8 bits": "per-token-8", "blocks, 8 bits": "blockwise-8-wide", "blocks, 4 bits": "blockwise-4",
    }.items()
    for how in ("", SPINNING)
}  # fmt: skip
# The same graphs in ONNX's own operators.
STANDARD = {f"{name}, standard": plan for name, plan in OURS.items() if not name.endswith(SPINNING)}
# And one as the system lays it out.
SMALL_PAGES = {"blocks, 8 bits, small pages": OURS["blocks, 8 bits"]}
GRAPHS = {**OURS, **STANDARD, **SMALL_PAGES}
# What ours are compared with, and the goals for the first shape: decode and prefill.
GOALS = {"llama.cpp Q8_0": (2.0, 3.0)}
LLAMA_CPP = {"llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_K_M": "Q4_K_M"}
TRANSFORMERS = {"PyTorch eager fp32": ("float32", False), "PyTorch compiled bf16": ("bfloat16", True)}
GENERATE, GENAI, FLOAT = "transformers generate", "onnxruntime-genai INT4", "onnxruntime fp32"
EVERY_SIDE = [*OURS, FLOAT, *STANDARD, *SMALL_PAGES, *LLAMA_CPP, GENAI, *TRANSFORMERS, GENERATE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    one = "only this side; may be given several times"
    parser.add_argument("--only", action="append", choices=EVERY_SIDE, metavar="SIDE", help=one)
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="while N other processes compute")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments.folder)))
        return
    read = peers.bandwidth(THREADS)
    print(f"memory is read at {read / 1e9:.1f} GB/s by {THREADS} threads", file=sys.stderr)
    shapes = [arguments.shape] if arguments.shape else list(SHAPES)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.beside)]
    try:
        result = {shape: compare(shape, arguments.rounds, read, arguments.only) for shape in shapes}
    finally:
        for other in others:
            other.kill()
            other.wait()
    told = {"rounds": arguments.rounds, "threads": THREADS, "beside": len(others), "GB/s": round(read / 1e9, 1)}
    print(json.dumps({**told, **result}))


def sides_of(shape: str, only: list[str] | None) -> list[str]:
    """Returns the sides that can be measured here, and says which cannot."""
    wanted = {
        **dict.fromkeys([*OURS, FLOAT, *STANDARD, *SMALL_PAGES]),
        **dict.fromkeys(LLAMA_CPP, "llama_cpp"),
        **({GENAI: "onnxruntime_genai"} if SHAPES[shape]["model_type"] == "llama" else {}),
        **dict.fromkeys([*TRANSFORMERS, GENERATE]),
    }
    found = []
    for side, module in wanted.items():
        if only and side not in only:
            continue
        if module is not None and not peers.installed(module):
            print(f"{side}: left out, because {module} is not installed (see benchmarks/peers.py)", file=sys.stderr)
            continue
        found.append(side)
    return found


def compare(shape: str, rounds: int, read: float, only: list[str] | None) -> dict[str, dict[str, float]]:
    """Measures all sides in turns and prints a table; returns the medians, and the ratios of ours to each other."""
    sides = sides_of(shape, only)
    with tempfile.TemporaryDirectory() as name:
        sizes = write(shape, sides, Path(name))
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for turn in range(rounds):
            for side in sides:
                found[side].append(peers.apart(__file__, side, Path(name) / side, THREADS))
            print(f"{shape}: round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
    table: dict[str, dict[str, float]] = {}
    for side in sides:
        row = {key: round(statistics.median(one[key] for one in found[side]), 1) for key in found[side][0]}
        row["files"] = round(sizes[side], 1)
        if side in OURS:
            row["share of the roof"] = round(row["decode"] * active_bytes(shape, side) / read, 3)
        table[side] = row
    show(shape, rounds, table)
    for side in (one for one in OURS if one in found):
        for other in sides:
            if other in OURS:
                continue
            for key in ("decode", "prefill", f"decode of {BATCH}"):
                ratios = [one[key] / two[key] for one, two in zip(found[side], found[other], strict=True)]
                table[side][f"{key} / {other}"] = round(statistics.median(ratios), 2)
        ratio_line(side, table[side], [one for one in sides if one not in OURS])
    return table


def show(shape: str, rounds: int, table: dict[str, dict[str, float]]) -> None:
    """Prints the medians."""
    print(f"\n{shape}, {THREADS} threads, tokens a second, medians of {rounds} rounds")
    print(f"{'':<27} {'decode':>8} {'prefill':>8} {f'{BATCH} texts':>8} {'peak':>8} {'files':>7}  of the roof")
    for side, row in table.items():
        roof = f"{row['share of the roof']:.0%}" if side in OURS else ""
        print(
            f"{side:<27} {row['decode']:8.1f} {row['prefill']:8.0f} {row[f'decode of {BATCH}']:8.1f} "
            f"{row['peak']:5.0f} MB {row['files']:4.0f} MB  {roof}"
        )


def ratio_line(side: str, row: dict[str, float], others: list[str]) -> None:
    """Prints how many times as fast as each of the others this side is, with the goals."""
    print(f"{side}: times as fast at decode, at prefill, at {BATCH} texts")
    for other in others:
        goal = "   goals: at least {} and {}".format(*GOALS[other]) if other in GOALS else ""
        ratios = (row[f"{key} / {other}"] for key in ("decode", "prefill", f"decode of {BATCH}"))
        print(f"  {other:<24}" + "".join(f"{ratio:8.2f}" for ratio in ratios) + goal)


def active_bytes(shape: str, side: str) -> float:
    """Returns the bytes that one token reads half-way through the decoding: its weights, and the cache in fp32."""
    import torch

    from lm.model import LanguageModel

    config = config_of(shape)
    with torch.device("meta"):
        active = LanguageModel(config).parameter_counts()[1]
    if not config.tie_word_embeddings:
        # One row of the embedding is read; tied, it is the head as well.
        active -= config.vocab_size * config.hidden_size
    # A block has a scale of 4 bytes. The head of 4 bits has 8, in wide blocks.
    bits, of_head = {"per-token-8": (8, 8), "blockwise-8-wide": (8.5, 8.5), "blockwise-4": (5, 8.5)}[OURS[side]]
    head = config.vocab_size * config.hidden_size
    cached = 4 * config.cache_width * config.num_hidden_layers * (PREFILL + DECODE / 2)
    return ((active - head) * bits + head * of_head) / 8 + cached


def config_of(shape: str) -> "ModelConfig":
    """Returns the shape as our models take it."""
    from pydantic import TypeAdapter

    from lm.config import ModelConfig

    found: ModelConfig = TypeAdapter(ModelConfig).validate_python(SHAPES[shape])
    return found


def write(shape: str, sides: list[str], folder: Path) -> dict[str, float]:
    """Writes the model below ``folder`` as each side reads it; returns the sizes of their files in MB."""
    from texts import write_trained_tokenizer

    from lm import gguf_write, hugging_face, onnx_model, onnx_standard
    from lm.gguf_tokenizer import PIECES
    from lm.model import LanguageModel
    from lm.quantization import PLANS, Plan
    from lm.rotation import turn_hidden
    from lm.scheme import Float

    model = LanguageModel(config_of(shape))
    model.initialize(0)
    tokenizer, checkpoint = folder / "tokenizer.json", folder / "checkpoint"
    write_trained_tokenizer(tokenizer, PIECES["llama-bpe"], WORDS)
    checkpoint.mkdir()
    hugging_face.save(model, tokenizer, checkpoint)
    for side in sides:
        place = folder / side
        if side in GRAPHS or side == FLOAT:
            place.mkdir()
            plan = Plan(Float(), Float()) if side == FLOAT else PLANS[GRAPHS[side]]
            # As the stage does it: the turns that are left while the model runs take their time.
            written = (folder if side in STANDARD else place) / "model.onnx"
            onnx_model.export(turn_hidden(copy.deepcopy(model), plan), plan, written)
            if side in STANDARD:
                onnx_standard.write(written, place / "model.onnx")
            (place / "tokenizer.json").write_bytes(tokenizer.read_bytes())
            (place / "config.json").write_text(json.dumps(hugging_face.config_to_json(model.config)))
        elif side in LLAMA_CPP:
            place.mkdir()
            plain = folder / "plain.gguf"
            if not plain.exists():
                gguf_write.write(checkpoint, plain, "f32", {})
            peers.quantize_gguf(plain, place / "model.gguf", LLAMA_CPP[side])
        elif side == GENAI:
            peers.build_genai(checkpoint, place, THREADS)
        else:
            place.symlink_to(checkpoint)
    return {side: sum(file.stat().st_size for file in (folder / side).iterdir()) / 1e6 for side in sides}


def make(side: str, folder: Path, batch: int) -> peers.Writer:
    """Returns the writer of ``side``."""
    if side in LLAMA_CPP:
        return peers.LlamaCpp(folder / "model.gguf", THREADS, MOST_TOKENS, batch)
    if side == GENAI:
        return peers.GenAI(folder, MOST_TOKENS)
    if side == GENERATE:
        return peers.Generate(folder, THREADS)
    if side in TRANSFORMERS:
        return peers.Transformers(folder, THREADS, *TRANSFORMERS[side], most_tokens=MOST_TOKENS)
    if side in SMALL_PAGES:
        with mock.patch("lm.huge_pages.join"), mock.patch("lm.huge_pages.collapse"):
            return peers.Graph(folder, THREADS)
    return peers.Graph(folder, THREADS, side.endswith(SPINNING))


def run_side(side: str, folder: Path) -> dict[str, float]:
    """Returns tokens a second of prefill, of decode and of decode in a batch, and the peak memory of one text in MB."""
    draw = np.random.default_rng(0)
    prefill, decode = timed(make(side, folder, 1), draw.integers(1, 8000, size=(1, PREFILL)), side == GENERATE)
    # Not getrusage, whose maximum is inherited from whoever started this process.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]
    batch = timed(make(side, folder, BATCH), draw.integers(1, 8000, size=(BATCH, BATCH_PREFILL)), side == GENERATE)[1]
    return {"decode": decode, "prefill": prefill, f"decode of {BATCH}": batch, "peak": peak}


def timed(writer: peers.Writer, prompts: peers.Ids, reads_anew: bool) -> tuple[float, float]:
    """Returns tokens a second of reading and writing, all rows together; ``reads_anew``: each writing reads as well."""
    # The first calls pay for buffers, kernels and compilers.
    writer.read(prompts)
    writer.write(WARM_UP)
    started = time.perf_counter()
    writer.read(prompts)
    reading = time.perf_counter() - started
    if not reads_anew:
        writer.write(WARM_UP)
    started = time.perf_counter()
    writer.write(DECODE)
    writing = time.perf_counter() - started - (reading if reads_anew else 0.0)
    return prompts.size / reading, DECODE * len(prompts) / writing


if __name__ == "__main__":
    main()
