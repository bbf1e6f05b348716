"""The shape of a model, in the terms of Hugging Face's configurations of the same ``model_type``."""

import math
from abc import abstractmethod
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Several times what the largest models have; a tensor may have as many numbers as three of these make.
Size = Annotated[int, Field(ge=1, le=2**18)]
# What the routers, and the norms, of a quantized model are.
FloatOrInt8 = Literal["float", "int8"]
# fp32, in which rotations are computed, has every whole number up to there.
Positions = Annotated[int, Field(ge=1, le=2**24)]
_MOST_ROTATIONS = 2**31
# Those with biases on queries, keys and values alone, whatever attention_bias says.
QWEN2 = ("qwen2", "qwen2_moe")


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _of(*families: str, default: Any, **constraints: Any) -> Any:
    """A field that some alone of the families know which its class describes; in the others it stays ``default``."""
    return Field(default=default, json_schema_extra={"kinds": [*families]}, **constraints)


class _Family(_Shape):
    model_type: str

    @model_validator(mode="after")
    def _its_family_knows_its_keys(self) -> Self:
        for name, field in type(self).model_fields.items():
            of: Any = field.json_schema_extra
            if of is None or self.model_type in of["kinds"] or (value := getattr(self, name)) == field.default:
                continue
            told = str(value).lower() if isinstance(value, bool) else value
            owners = " and ".join(of["kinds"])
            raise ValueError(f"{name} is {told}; it is a key of {owners}, not of a {self.model_type}; remove it")
        return self


class Llama3Scaling(_Shape):
    """Llama 3's stretching of the slow rotations (arXiv 2407.21783, section 3.4.3; in Hugging Face's terms)."""

    rope_type: Literal["llama3"]
    factor: float = Field(gt=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: Positions

    @model_validator(mode="after")
    def _the_band_is_one(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not more than low_freq_factor {self.low_freq_factor}"
            )
        return self

    @property
    def rotation_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


class LinearScaling(_Shape):
    """All rotations slowed down alike (position interpolation, arXiv 2306.15595), as DeepSeek-Coder has it."""

    rope_type: Literal["linear"]
    factor: float = Field(ge=1)

    @property
    def rotation_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


class DynamicScaling(_Shape):
    """Rotations that are slowed down for texts longer than the model has positions for, and for no others ("dynamic
    NTK"): here, where there are none, it is kept for whoever runs the model.
    """

    rope_type: Literal["dynamic"]
    factor: float = Field(ge=1)

    @property
    def rotation_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


class YarnScaling(_Shape):
    """YaRN's stretching, rotation by rotation (arXiv 2309.00071, section 3.2; in Hugging Face's terms).

    DeepSeek sets ``mscale`` and ``mscale_all_dim``: the first scales the rotations, the second the scores.
    """

    rope_type: Literal["yarn"]
    factor: float = Field(gt=1)
    original_max_position_embeddings: Positions
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float | None = Field(default=None, ge=0)
    mscale_all_dim: float | None = Field(default=None, ge=0)
    # None: as the factor and the two above give it.
    attention_factor: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _the_band_is_one(self) -> Self:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} is less than beta_slow {self.beta_slow}")
        return self

    @property
    def rotation_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def score_scale(self) -> float:
        """What DeepSeek's attention multiplies its scores by, besides what is always there."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


RopeScaling = Llama3Scaling | LinearScaling | DynamicScaling | YarnScaling


class LatentArchitecture(_Family):
    """What a user chooses about a DeepSeek-V3-style decoder (DeepSeek-V3 report, arXiv 2412.19437, section 2.1).

    DeepSeek-V2 (arXiv 2405.04434, section 2.2) scores experts by a softmax over all of them instead of sigmoids, a
    group by its best one, and has no bias that evens them out.
    """

    model_type: Literal["deepseek_v3", "deepseek_v2"]
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    # Latent attention: queries and keys have a part without position (nope) and a rotary part (rope).
    q_lora_rank: Size | None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size = Field(ge=2)
    v_head_dim: Size
    rope_theta: float = Field(gt=1)
    rope_scaling: YarnScaling | None = None
    # Feed-forward: the first layers dense, the others mixtures of experts.
    intermediate_size: Size
    first_k_dense_replace: int = Field(ge=0)
    moe_intermediate_size: Size
    n_routed_experts: Size = Field(ge=2)
    n_shared_experts: Size
    num_experts_per_tok: Size
    n_group: Size
    topk_group: Size
    norm_topk_prob: bool
    routed_scaling_factor: float = Field(gt=0)
    # Depths of multi-token prediction (DeepSeek-V3 report, section 2.2): 1 also learns the token after the next one.
    num_nextn_predict_layers: int = _of("deepseek_v3", default=0, ge=0)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)

    @model_validator(mode="after")
    def _the_numbers_fit(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE turns pairs, so make it even")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts {self.n_routed_experts} does not divide into n_group {self.n_group}")
        if self.has_bias and self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"n_group {self.n_group} leaves fewer than 2 of {self.n_routed_experts} experts in a group, "
                "and a group is scored by its best two; lower n_group"
            )
        if self.norm_topk_prob and not self.has_bias:
            raise ValueError("norm_topk_prob is true; deepseek_v2 does not normalize the experts' weights")
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
    def shared_size(self) -> int:
        """The inner size of what each token sees beside its routed experts."""
        return self.moe_intermediate_size * self.n_shared_experts

    @property
    def has_bias(self) -> bool:
        """Whether a bias evens the experts out."""
        return self.model_type == "deepseek_v3"

    @property
    def score_scale(self) -> float:
        """What the products of queries and keys are multiplied by before the softmax."""
        return self.qk_head_dim**-0.5 * (self.rope_scaling.score_scale if self.rope_scaling else 1.0)

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


class GroupedShape(_Family):
    """What all decoders with grouped-query attention have."""

    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size = Field(ge=2)
    rope_theta: float = Field(gt=1)
    rope_scaling: Annotated[RopeScaling, Field(discriminator="rope_type")] | None
    tie_word_embeddings: bool
    initializer_range: float = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    # Of queries, keys, values and outputs. Qwen2's always have those of the first three, and no other.
    attention_bias: bool = _of("llama", "qwen3", "qwen3_moe", default=False)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE turns pairs, so make it even")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide into num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self

    @property
    def has_biases(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias or self.model_type in QWEN2

    @property
    def norms_heads(self) -> bool:
        return self.model_type in ("qwen3", "qwen3_moe")

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head turn with the position."""
        return self.head_dim

    @property
    def cache_head_dim(self) -> int:
        """How wide a head is in the exported graph, whose attention takes multiples of 16 (OpenLLaMA has 100)."""
        return -(-self.head_dim // 16) * 16

    @property
    def cache_width(self) -> int:
        """How many numbers a layer of the exported graph keeps for each token: its keys and values, filled up."""
        return 2 * self.num_key_value_heads * self.cache_head_dim


class GroupedArchitecture(GroupedShape):
    """What a user chooses about a Llama-, Qwen2- or Qwen3-style decoder: grouped-query attention, dense SwiGLU.

    Qwen2 adds biases to queries, keys and values (arXiv 2407.10671); Qwen3 norms each head's queries and keys instead
    (arXiv 2505.09388). Some of Llama's shape have biases everywhere, as Granite's code models (arXiv 2405.04324).
    """

    model_type: Literal["llama", "qwen2", "qwen3"]
    intermediate_size: Size
    # Of all three products of a feed-forward.
    mlp_bias: bool = _of("llama", default=False)


class GroupedMixtureArchitecture(GroupedShape):
    """What a user chooses about a Qwen2- or Qwen3-MoE-style decoder: Qwen2's or Qwen3's attention, and a mixture of
    experts in each layer.

    Experts are scored by a softmax over all of them, and no bias evens them out. Qwen2 has one more that each token
    sees, as far as a gate says (arXiv 2407.10671, section 2.2.2); Qwen3 has none (arXiv 2505.09388, section 2).
    """

    model_type: Literal["qwen2_moe", "qwen3_moe"]
    moe_intermediate_size: Size
    num_experts: Size = Field(ge=2)
    num_experts_per_tok: Size
    norm_topk_prob: bool
    shared_expert_intermediate_size: Size | None = _of("qwen2_moe", default=None)

    @model_validator(mode="after")
    def _the_shared_expert_is_there(self) -> Self:
        if self.model_type == "qwen2_moe" and self.shared_expert_intermediate_size is None:
            raise ValueError("shared_expert_intermediate_size is missing; add it, a qwen2_moe has a shared expert")
        return self

    @model_validator(mode="after")
    def _there_are_enough_experts(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}"
            )
        return self

    # What DeepSeek's mixtures have besides, in their terms.

    @property
    def n_routed_experts(self) -> int:
        return self.num_experts

    @property
    def shared_size(self) -> int:
        return self.shared_expert_intermediate_size or 0

    @property
    def n_group(self) -> int:
        return 1

    @property
    def topk_group(self) -> int:
        return 1

    @property
    def routed_scaling_factor(self) -> float:
        return 1.0

    @property
    def has_bias(self) -> bool:
        return False


class _Tokens(_Shape):
    vocab_size: int = Field(ge=2, le=2**31)
    max_position_embeddings: Positions
    bos_token_id: int = Field(ge=0)
    eos_token_id: int = Field(ge=0)
    # Of the windows that it was trained on last, where that is less than it has positions for.
    training_length: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _the_rotations_fit(self) -> Self:
        if self.max_position_embeddings * self.rotary_dim > _MOST_ROTATIONS:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings:,} is too many for heads of which "
                f"{self.rotary_dim:,} numbers turn; at most {_MOST_ROTATIONS // self.rotary_dim:,} are computed"
            )
        return self

    @property
    @abstractmethod
    def rotary_dim(self) -> int:
        """How many numbers of a head turn with the position."""

    @property
    def window(self) -> int:
        """How many tokens it is trained and measured on at a time."""
        return self.training_length or self.max_position_embeddings


class LatentConfig(LatentArchitecture, _Tokens):
    """An architecture with what the tokenizer and the training add to it."""


class GroupedConfig(GroupedArchitecture, _Tokens):
    """An architecture with what the tokenizer and the training add to it."""


class GroupedMixtureConfig(GroupedMixtureArchitecture, _Tokens):
    """An architecture with what the tokenizer and the training add to it."""


Architecture = LatentArchitecture | GroupedArchitecture | GroupedMixtureArchitecture
ModelConfig = LatentConfig | GroupedConfig | GroupedMixtureConfig
# Those that have experts; DeepSeek's first layers may be without.
MixtureConfig = LatentConfig | GroupedMixtureConfig


_Described = TypeVar("_Described", bound=Architecture)


def without_further(architecture: _Described) -> _Described:
    """Returns ``architecture`` without the layers that predict further tokens, which only training has a use for."""
    if not isinstance(architecture, LatentArchitecture):
        return architecture
    return architecture.model_copy(update={"num_nextn_predict_layers": 0})


def layers_and_experts(config: ModelConfig) -> int:
    """Returns how many layers and experts there are in all; each has tensors of its own."""
    layers, dense, experts = config.num_hidden_layers, 0, 0
    if isinstance(config, LatentConfig):
        layers, dense = layers + config.num_nextn_predict_layers, config.first_k_dense_replace
    if isinstance(config, MixtureConfig):
        experts = config.n_routed_experts
    return layers + (layers - dense) * experts


def completed(architecture: Architecture, **tokens: int) -> ModelConfig:
    """Returns ``architecture`` with what a tokenizer and a training add: ``tokens`` are the fields of that."""
    kind = next(kind for kind in get_args(ModelConfig) if issubclass(kind, type(architecture)))
    config: ModelConfig = kind(**architecture.model_dump(), **tokens)
    return config
