"""A project of its own for one test: tiny shards, a tiny model, and the stages run as they are run in earnest."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
from ruamel.yaml import YAML

from tasks import shards
from tasks.champion import MODEL_FILES
from tasks.section import read_section
from tasks.shards import Manifest, ShardEntry
from tasks.train.params import TrainParams

ROOT = Path(__file__).parent.parent.parent
VOCAB = 257

TINY_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
}
LLAMA = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "intermediate_size": 48,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
}
QWEN3_MOE = {
    **{name: value for name, value in LLAMA.items() if name != "intermediate_size"},
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
# For tests to which it does not matter how many processes train: one, in larger passes, is a third of the time.
ALONE = {
    f"{stage}__{name}": value
    for stage in ("train", "quantize")
    for name, value in {"world_size": 1, "micro_batch": 4}.items()
}
# In the order of their ids, which follow those of the bytes and <|endoftext|>; whether each is special.
CHAT_TOKENS = {"<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False}
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TINY_TRAINING = {
    "steps": 12,
    "global_batch": 8,
    "micro_batch": 2,
    "validate_every": 4,
    "validation_windows": 6,
    "checkpoint_every": 2,
}


def write_params(folder: Path, **changes: Any) -> None:
    """Writes the default params.yaml, made tiny; ``changes`` are values by dotted path with '__' for the dots."""
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params["shard"]["vocab_size"] = 300
    params["train"].update({**TINY_TRAINING, "seq_len": 16})
    params["train"]["model"].update(TINY_MODEL)
    params["quantize"].update({**TINY_TRAINING, "steps": 4})
    params["evaluate"]["bootstrap_samples"] = 200
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = params
        for section in sections:
            place = place[section]
        place[key] = value
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    (folder / "requirements.lock").write_text("")


def train_params(folder: Path, **changes: Any) -> TrainParams:
    """Writes ``params.yaml`` as :func:`write_params` does and returns its section ``train``."""
    write_params(folder, **changes)
    return read_section("train", TrainParams, folder / "params.yaml")


def write_shards(folder: Path, documents: int = 40) -> Manifest:
    """Writes shards of synthetic text: bytes that follow each other by a rule a model can learn."""
    place = folder / "data" / "shards"
    place.mkdir(parents=True)
    generator = np.random.default_rng(0)
    entries = []
    for split, count in (("train", documents), ("valid", 8), ("test", 8)):
        texts = [_text(generator) for _ in range(count)]
        tokens = np.concatenate([np.array([VOCAB - 1, *text.encode()], dtype=np.uint16) for text in texts])
        sizes = np.array([len(text) for text in texts])
        offsets = np.concatenate([[0], np.cumsum(sizes + 1)])
        content = shards.encode_shard(tokens, offsets, sizes)
        name = f"{split}-00000.h5"
        (place / name).write_bytes(content)
        entries.append(
            ShardEntry(
                file=name,
                split=split,  # type: ignore[arg-type]
                digest=shards.digest(content),
                tokens=len(tokens),
                documents=count,
                bytes=int(sizes.sum()),
            )
        )
    write_tokenizer(place / "tokenizer.json")
    manifest = Manifest(
        vocab_size=VOCAB, bos_token_id=VOCAB - 1, eos_token_id=VOCAB - 1, dtype="uint16",
        tokenizer_digest=shards.digest((place / "tokenizer.json").read_bytes()),
        shards=entries,
    )  # fmt: skip
    manifest.write(place)
    return manifest


def write_champion(folder: Path, version: str | None = None, **record: Any) -> None:
    """Writes ``models/champion`` as the flow does: the INT8 model in ``models/int8`` as ``version``, or no champion."""
    place = folder / "models" / "champion"
    place.mkdir(parents=True, exist_ok=True)
    if version is not None:
        for name in MODEL_FILES:
            shutil.copy(folder / "models" / "int8" / name, place / name)
    (place / "champion.json").write_text(json.dumps({"version": version, **record}))


def stage(name: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts ``python -m tasks.NAME`` in ``folder``."""
    return subprocess.Popen(
        [sys.executable, "-m", f"tasks.{name}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(name: str, folder: Path, prepare: Callable[[], None] = forked.nothing, **environment: str) -> tuple[int, str]:
    """Runs a stage to its end; returns its exit code and what it printed. ``prepare``: see :func:`forked.stage`."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        (code,) = forked.end([forked.stage(name, folder, log, {**os.environ, **environment}, prepare)], 300)
        assert code is not None
        return code, log.read_text()


def error_line(output: str) -> str:
    """Returns the one error line of ``output``; fails when there is none, or a traceback."""
    assert "Traceback" not in output, output
    lines = re.findall(r"^error: (.*)$", output, re.MULTILINE)
    assert len(lines) == 1, output
    return lines[0]


def first_step(events: Path) -> dict[str, Any]:
    """Returns the first step that a training told of in the file ``events``, after what it says of a checkpoint."""
    return next(event for event in map(json.loads, events.read_text().splitlines()) if not event["notice"])


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the content of each file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _text(generator: np.random.Generator) -> str:
    words = ["in the", " beginning", " was", " light", " and", " night", "; the day", " of the", " sea."]
    return "".join(words[index] for index in generator.integers(0, len(words), 60))


def write_tokenizer(path: Path) -> None:
    """Writes a tokenizer.json whose tokens are the 256 bytes and <|endoftext|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    # The vocabulary of bare bytes, in the order of the bytes, is what byte-level BPE without a merge amounts to.
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    vocab = {chr(byte): byte for byte in kept} | {chr(256 + index): byte for index, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<|endoftext|>": VOCAB - 1}, merges=[]))
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", VOCAB - 1)]
    )
    tokenizer.save(str(path))


def write_chat_tokenizer(folder: Path) -> None:
    """Writes the tokenizer of :func:`write_tokenizer` with :data:`CHAT_TOKENS`, and which tokens begin and end what."""
    from tokenizers import AddedToken, Tokenizer

    write_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for content, special in CHAT_TOKENS.items():
        tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")}
    for name, content in {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
            "eos_token": "<|im_end|>",
            "unk_token": None,
        },
        "generation_config.json": {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]},
    }.items():
        (folder / name).write_text(json.dumps(content))
