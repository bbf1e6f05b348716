"""The shape of a model, in the terms of Hugging Face's configurations of the same ``model_type``."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class LatentArchitecture(_Shape):
    """What a user chooses about a DeepSeek-V3-style decoder (DeepSeek-V3 report, arXiv 2412.19437, section 2.1)."""

    model_type: Literal["deepseek_v3"]
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    # Latent attention: queries and keys have a part without position (nope) and a rotary part (rope).
    q_lora_rank: int | None = Field(ge=1)
    kv_lora_rank: int = Field(ge=1)
    qk_nope_head_dim: int = Field(ge=1)
    qk_rope_head_dim: int = Field(ge=2)
    v_head_dim: int = Field(ge=1)
    rope_theta: float = Field(gt=0)
    # Feed-forward: the first layers dense, the others mixtures of experts.
    intermediate_size: int = Field(ge=1)
    first_k_dense_replace: int = Field(ge=0)
    moe_intermediate_size: int = Field(ge=1)
    n_routed_experts: int = Field(ge=2)
    n_shared_experts: int = Field(ge=1)
    num_experts_per_tok: int = Field(ge=1)
    n_group: int = Field(ge=1)
    topk_group: int = Field(ge=1)
    norm_topk_prob: bool
    routed_scaling_factor: float = Field(gt=0)
    initializer_range: float = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)

    @model_validator(mode="after")
    def _the_numbers_fit(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE turns pairs, so make it even")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts {self.n_routed_experts} does not divide into n_group {self.n_group}")
        if self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"n_group {self.n_group} leaves fewer than 2 of {self.n_routed_experts} experts in a group, "
                "and a group is scored by its best two; lower n_group"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the {reachable} experts "
                "that topk_group lets a token reach"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} is more than num_hidden_layers "
                f"{self.num_hidden_layers}"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head turn with the position."""
        return self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """How many numbers a layer keeps for each token: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class RopeScaling(_Shape):
    """Llama 3's stretching of the slow rotations (arXiv 2407.21783, section 3.4.3; in Hugging Face's terms)."""

    factor: float = Field(gt=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)

    @model_validator(mode="after")
    def _the_band_is_one(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not more than low_freq_factor {self.low_freq_factor}"
            )
        return self


class GroupedArchitecture(_Shape):
    """What a user chooses about a Llama-, Qwen2- or Qwen3-style decoder: grouped-query attention, dense SwiGLU.

    Qwen2 adds biases to queries, keys and values (arXiv 2407.10671); Qwen3 norms each head's queries and keys instead
    (arXiv 2505.09388).
    """

    model_type: Literal["llama", "qwen2", "qwen3"]
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    rope_theta: float = Field(gt=0)
    rope_scaling: RopeScaling | None
    intermediate_size: int = Field(ge=1)
    tie_word_embeddings: bool
    initializer_range: float = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)

    @model_validator(mode="after")
    def _the_numbers_fit(self) -> Self:
        if self.head_dim % 16:
            raise ValueError(f"head_dim is {self.head_dim}; the exported graph's attention takes multiples of 16")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide into num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self

    @property
    def has_biases(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def norms_heads(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head turn with the position."""
        return self.head_dim


class _Tokens(_Shape):
    vocab_size: int = Field(ge=2)
    max_position_embeddings: int = Field(ge=1)
    bos_token_id: int = Field(ge=0)
    eos_token_id: int = Field(ge=0)


class LatentConfig(LatentArchitecture, _Tokens):
    """An architecture with what the tokenizer and the training add to it."""

    @property
    def tie_word_embeddings(self) -> bool:
        return False


class GroupedConfig(GroupedArchitecture, _Tokens):
    """An architecture with what the tokenizer and the training add to it."""


ModelConfig = LatentConfig | GroupedConfig
