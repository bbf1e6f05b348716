"""Small random models in which a mistake shows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch

from lm import hugging_face, hugging_face_config, onnx_model
from lm.config import GroupedConfig, GroupedMixtureConfig, LatentConfig
from lm.model import LanguageModel
from lm.quantization import PLANS

# Odd sizes and several expert groups: a mistake in an axis does not cancel out.
ODD = {
    "model_type": "deepseek_v3",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "rope_theta": 10000.0,
    "intermediate_size": 70,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 22,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "bos_token_id": 100,
    "eos_token_id": 100,
}


ODD_GROUPED = {
    "model_type": "llama",
    "hidden_size": 42,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "intermediate_size": 70,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "bos_token_id": 100,
    "eos_token_id": 100,
}


# A third of its experts a token.
ODD_GROUPED_MIXTURE = {
    **{name: value for name, value in ODD_GROUPED.items() if name != "intermediate_size"},
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 22,
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}


# All of it is unlike Qwen3's but for the router: biases, weights that are not normalized, a shared expert with a gate.
ODD_GATED_MIXTURE = {
    **ODD_GROUPED_MIXTURE,
    "model_type": "qwen2_moe",
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 38,
}


def make_grouped(**changes: Any) -> LanguageModel:
    """A Llama- or Qwen-type model with random weights, its biases and norms random too."""
    return _with_odd_vectors(LanguageModel(GroupedConfig.model_validate({**ODD_GROUPED, **changes})))


def make_grouped_mixture(**changes: Any) -> LanguageModel:
    """A Qwen3-MoE-type model, as :func:`make_grouped` makes one without experts."""
    return _with_odd_vectors(LanguageModel(GroupedMixtureConfig.model_validate({**ODD_GROUPED_MIXTURE, **changes})))


def make_gated_mixture(**changes: Any) -> LanguageModel:
    """A Qwen2-MoE-type model, as :func:`make_grouped` makes one without experts."""
    return make_grouped_mixture(**{**ODD_GATED_MIXTURE, **changes})


def _with_odd_vectors(model: LanguageModel) -> LanguageModel:
    model.initialize(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def make_model(**changes: Any) -> LanguageModel:
    """A model with random weights and router biases that are partly negative: zero biases hide routing mistakes."""
    model = LanguageModel(LatentConfig.model_validate({**ODD, **changes}))
    model.initialize(3)
    generator = torch.Generator().manual_seed(4)
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            bias = router.e_score_correction_bias
            bias.copy_(torch.randn(bias.shape, generator=generator) * 0.3)
    return model.eval()


def export_over_bytes(folder: Path, make: Callable[..., LanguageModel] = make_model, **changes: Any) -> Path:
    """Writes an untrained model over bytes into ``folder``, exported, as :class:`lm.runtime.Generator` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(folder / "tokenizer.json")
    model = make(
        **{"vocab_size": tiny.VOCAB, "bos_token_id": tiny.VOCAB - 1, "eos_token_id": tiny.VOCAB - 1, **changes}
    )
    onnx_model.export(model, PLANS["per-token-8"], folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps(hugging_face_config.config_to_json(model.config)))
    return folder


def export_to_chat(folder: Path, context: int = 256) -> Path:
    """Writes a model as :func:`export_over_bytes` does that reads conversations in ChatML."""
    export_over_bytes(folder, vocab_size=tiny.VOCAB + len(tiny.CHAT_TOKENS), max_position_embeddings=context)
    tiny.write_chat_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(tiny.CHATML)
    return folder


def write_checkpoint(folder: Path, make: Callable[..., LanguageModel] = make_grouped, **changes: Any) -> LanguageModel:
    """Writes a checkpoint over bytes into ``folder``, as people publish them; returns its model.

    Its embedding has more rows than the tokenizer has tokens, and a template of a chat lies beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(folder / "made.json")
    ends = {"bos_token_id": tiny.VOCAB - 1, "eos_token_id": tiny.VOCAB - 1}
    model = make(**{"vocab_size": tiny.VOCAB + 7, **ends, **changes})
    hugging_face.save(model, folder / "made.json", folder)
    (folder / "made.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return model
