"""The keys under which GGUF holds a model's shape, by the names that :mod:`lm.config` has for it. Imports no torch."""

from typing import get_args

from lm.config import GroupedConfig, GroupedMixtureConfig, LatentConfig, ModelConfig

Value = int | float | bool | str

# llama.cpp's names for DeepSeek-V2 and V3, and for Qwen2 and Qwen3 with experts.
LATENT = "deepseek2"
GROUPED_MIXTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
ARCHITECTURES = (LATENT, *get_args(GroupedConfig.model_fields["model_type"].annotation), *GROUPED_MIXTURES.values())
# How V2's and V3's routers score experts.
SOFTMAX, SIGMOID = 1, 2
_DENSE_KEY = "feed_forward_length"
_ALL = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    _DENSE_KEY: "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_GROUPED = {**_ALL, "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
KEYS: dict[type[ModelConfig], dict[str, str]] = {
    GroupedConfig: _GROUPED,
    GroupedMixtureConfig: {
        **{key: name for key, name in _GROUPED.items() if key != _DENSE_KEY},
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
    },
    LatentConfig: {
        **_ALL,
        "attention.q_lora_rank": "q_lora_rank",
        "attention.kv_lora_rank": "kv_lora_rank",
        "attention.value_length_mla": "v_head_dim",
        "rope.dimension_count": "qk_rope_head_dim",
        "leading_dense_block_count": "first_k_dense_replace",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_count": "n_routed_experts",
        "expert_shared_count": "n_shared_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "expert_weights_norm": "norm_topk_prob",
        "expert_weights_scale": "routed_scaling_factor",
    },
}
# What llama.cpp has no key for: ours, so that a model that comes back is the one that went.
OWN = "overnight."
# What begins the keys of stretched rotations, and what one of YaRN ends with.
SCALING, MULTIPLIER = "rope.scaling.", "yarn_log_multiplier"
# YaRN's beta_fast and beta_slow: llama.cpp knows keys for them, and writes the same text whatever they say (a llama in
# xllamacpp 2026.10.11549).
BETAS = (32.0, 1.0)
# Beside the one that eos is, it takes these two for ends of a text.
FURTHER_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
