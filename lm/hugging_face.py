"""Checkpoints in Hugging Face layout: ``config.json``, ``model.safetensors``, tokenizer files.

On disk each expert has its own three matrices; in memory they are stacked. A head that is tied to the embedding is not
on disk. All other tensors have one name in both.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lm.config import ModelConfig
from lm.config_json import config_from_json, config_to_json
from lm.model import LanguageModel

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def state_to_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of ``state`` under the names of the layout, experts one by one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            for index, both in enumerate(tensor):
                gate, up = both.chunk(2)
                prefix = f"{name.removesuffix('.gate_up_proj')}.{index}"
                tensors[f"{prefix}.gate_proj.weight"], tensors[f"{prefix}.up_proj.weight"] = gate, up
        elif name.endswith(".mlp.experts.down_proj"):
            for index, down in enumerate(tensor):
                tensors[f"{name.removesuffix('.down_proj')}.{index}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def layout_to_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of the layout under the names of :class:`LanguageModel`, experts stacked."""
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
        else:
            state[name] = tensor
    for prefix, parts in experts.items():
        ordered = [parts[index] for index in range(len(parts))]
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([part["gate"], part["up"]]) for part in ordered])
        state[f"{prefix}.down_proj"] = torch.stack([part["down"] for part in ordered])
    return state


def save(model: LanguageModel, tokenizer: Path, folder: Path) -> None:
    """Writes ``model`` and a copy of the file ``tokenizer`` into ``folder``; equal models give equal bytes."""
    config = model.config
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state_to_layout(state), folder / "model.safetensors", metadata={"format": "pt"})
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.eos_token_id,
    }
    for name, content in {
        "config.json": config_to_json(config),
        "generation_config.json": {"_from_model_config": True, **ids},
        "tokenizer_config.json": _tokenizer_config(tokenizer, config),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def load(folder: Path) -> LanguageModel:
    """Returns the model in ``folder``, in fp32 on the CPU."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = LanguageModel(config_from_json(json.loads((folder / "config.json").read_text())))
    state = layout_to_state(tensors)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def _tokenizer_config(tokenizer: Path, config: ModelConfig) -> dict[str, Any]:
    added = json.loads(tokenizer.read_text())["added_tokens"]
    special = {token["id"]: token["content"] for token in added}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[config.bos_token_id],
        "eos_token": special[config.eos_token_id],
        "pad_token": special[config.eos_token_id],
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
