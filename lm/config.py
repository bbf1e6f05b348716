"""The shape of a model, in the terms of Hugging Face's ``DeepseekV3Config``."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Architecture(BaseModel):
    """What a user chooses about a DeepSeek-V3-style decoder (DeepSeek-V3 report, arXiv 2412.19437, section 2.1)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

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


class ModelConfig(Architecture):
    """An architecture with what the tokenizer and the training add to it."""

    vocab_size: int = Field(ge=2)
    max_position_embeddings: int = Field(ge=1)
    bos_token_id: int = Field(ge=0)
    eos_token_id: int = Field(ge=0)
