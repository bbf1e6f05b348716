"""``config.json`` as transformers writes and reads it. Imports no torch."""

from typing import Any

from lm.config import GroupedConfig, LatentConfig, ModelConfig, RopeScaling


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Returns ``config.json`` as transformers reads it."""
    if isinstance(config, LatentConfig):
        own = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "num_key_value_heads": config.num_attention_heads,
            "head_dim": config.qk_rope_head_dim,
            "attention_bias": False,
            "rope_interleave": True,
            "num_nextn_predict_layers": 0,
        }
        scaling = None
    else:
        own = {"architectures": [_ARCHITECTURES[config.model_type]], "attention_bias": config.has_biases}
        scaling = config.rope_scaling
    stretched = None if scaling is None else {"rope_type": "llama3", **scaling.model_dump()}
    return {
        "dtype": "float32",
        **config.model_dump(),
        **own,
        # transformers 5 reads the nested values, earlier releases the flat ones.
        "rope_parameters": {**(stretched or {"rope_type": "default"}), "rope_theta": config.rope_theta},
        "rope_scaling": stretched,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": config.eos_token_id,
    }


_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def config_from_json(content: dict[str, Any]) -> ModelConfig:
    """Returns the part of ``config.json`` that shapes the model."""
    kind = LatentConfig if content["model_type"] == "deepseek_v3" else GroupedConfig
    known = {name: content[name] for name in kind.model_fields if name in content}
    rope = content["rope_parameters"]
    known["rope_theta"] = rope["rope_theta"]
    if kind is GroupedConfig:
        stretched = {name: rope[name] for name in RopeScaling.model_fields if name in rope}
        known["rope_scaling"] = stretched or None
    return kind.model_validate(known)
