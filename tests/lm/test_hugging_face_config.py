"""``config.json`` as published checkpoints have it."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lm.config import DynamicScaling, GroupedConfig, LinearScaling, Llama3Scaling, YarnScaling
from lm.hugging_face_config import Unusable, config_from_json, config_to_json

# As older releases of transformers wrote it: no head_dim, a flat base, a type of the weights under its old name.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 96, "hidden_act": "silu", "vocab_size": 300,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": [2, 5], "torch_dtype": "bfloat16",
    "pretraining_tp": 1, "use_cache": True, "rope_theta": 500000, "tie_word_embeddings": True,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v2", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
    "kv_lora_rank": 20, "q_lora_rank": None, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 14,
    "intermediate_size": 70, "first_k_dense_replace": 1, "moe_intermediate_size": 22, "n_routed_experts": 8,
    "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    "norm_topk_prob": False, "scoring_func": "softmax", "routed_scaling_factor": 1, "rms_norm_eps": 1e-06,
    "vocab_size": 101, "max_position_embeddings": 160, "bos_token_id": 100, "eos_token_id": 99, "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 32, "type": "yarn",
    },
}  # fmt: skip

# As Qwen published it, but for its sizes.
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 99,
    "decoder_sparse_step": 1, "eos_token_id": 98, "head_dim": 16, "hidden_act": "silu", "hidden_size": 48,
    "initializer_range": 0.02, "intermediate_size": 144, "max_position_embeddings": 128, "max_window_layers": 2,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 24, "norm_topk_prob": True,
    "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 100,
}  # fmt: skip

# As Qwen published Qwen1.5-MoE-A2.7B, but for its sizes. Qwen2-57B-A14B's has mlp_only_layers besides.
QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 99, "decoder_sparse_step": 1,
    "eos_token_id": 99, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 88,
    "max_position_embeddings": 128, "max_window_layers": 1, "model_type": "qwen2_moe", "moe_intermediate_size": 22,
    "norm_topk_prob": False, "num_attention_heads": 4, "num_experts": 6, "num_experts_per_tok": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 88,
    "sliding_window": 64, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 100,
}  # fmt: skip


def test_what_an_older_file_leaves_out_has_its_default() -> None:
    config = config_from_json(LLAMA)
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)
    assert (config.rope_theta, config.rope_scaling) == (500000, None)
    assert (config.rms_norm_eps, config.initializer_range, config.tie_word_embeddings) == (1e-6, 0.02, True)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert config_from_json({**LLAMA, "model_type": "qwen3"}).head_dim == 128
    without = {name: value for name, value in QWEN3_MOE.items() if name not in ("head_dim", "norm_topk_prob")}
    config = config_from_json({**without, "hidden_size": 64})
    assert (config.head_dim, config.norm_topk_prob) == (16, False)


def test_a_flat_stretching_of_any_age_is_read() -> None:
    llama3 = {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
    }  # fmt: skip
    for name in ("type", "rope_type"):
        config = config_from_json({**LLAMA, "rope_scaling": {**llama3, name: "llama3"}})
        assert config.rope_scaling == Llama3Scaling(rope_type="llama3", **llama3)
    # Qwen's cards say to add this one; it has no length of its own beside that of the model.
    stretched = config_from_json({**LLAMA, "model_type": "qwen2", "rope_scaling": {"factor": 4.0, "type": "yarn"}})
    assert stretched.rope_scaling == YarnScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    evenly = config_from_json({**LLAMA, "rope_scaling": {"factor": 4.0, "type": "linear"}})
    assert evenly.rope_scaling == LinearScaling(rope_type="linear", factor=4.0)
    longer = config_from_json({**LLAMA, "rope_scaling": {"factor": 2.0, "type": "dynamic"}})
    assert longer.rope_scaling == DynamicScaling(rope_type="dynamic", factor=2.0)
    deepseek = config_from_json(DEEPSEEK).rope_scaling
    assert isinstance(deepseek, YarnScaling)
    assert (deepseek.mscale, deepseek.beta_fast, deepseek.rotation_scale) == (0.707, 32, 1)


def test_a_factor_of_which_transformers_knows_nothing_is_passed_over() -> None:
    # As DeepSeek-R1-0528-Qwen3-8B has it.
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attn_factor": 0.878}
    content = {**LLAMA, "model_type": "qwen3", "rope_scaling": scaling}
    read = config_from_json(content).rope_scaling
    assert read is not None
    _, theirs = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**copy.deepcopy(content)), torch.device("cpu"))
    assert read.rotation_scale == pytest.approx(theirs, rel=1e-12)


def test_a_stretching_that_was_added_to_a_newer_file_holds() -> None:
    # As Qwen's cards say to do, and releases of transformers from 5 on write the other key.
    added = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    newer = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500000}, "rope_scaling": added}
    assert config_from_json(newer).rope_scaling == YarnScaling(**added)
    assert (
        config_from_json(newer).rope_theta == AutoConfig.for_model(**copy.deepcopy(newer)).rope_parameters["rope_theta"]
    )
    # transformers would take 10,000.
    with pytest.raises(
        Unusable, match=r"rope_theta 500000, and rope_scaling, .* would be 10000\.0; write it into rope_s"
    ):
        config_from_json({**newer, "rope_theta": None})
    within = {**newer, "rope_theta": None, "rope_scaling": {**added, "rope_theta": 500000}}
    assert config_from_json(within).rope_theta == 500000


@pytest.mark.parametrize(
    "content",
    [
        LLAMA,
        {**LLAMA, "attention_bias": True, "mlp_bias": True},
        DEEPSEEK,
        {**DEEPSEEK, "n_group": 4, "topk_group": 2},
        QWEN2_MOE,
        {**QWEN2_MOE, "mlp_only_layers": []},
        QWEN3_MOE,
    ],
)
def test_what_is_written_is_what_was_read(content: dict[str, Any], tmp_path: Any) -> None:
    config = config_from_json(content)
    written = config_to_json(config)
    assert config_from_json(written) == config
    theirs = AutoConfig.for_model(**written)
    assert config_from_json(theirs.to_dict()) == config
    assert "training_length" not in written
    shorter = config.model_copy(update={"training_length": 9})
    assert config_from_json(config_to_json(shorter)).window == 9


def test_biases_are_those_that_a_file_says() -> None:
    config = config_from_json({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert isinstance(config, GroupedConfig)
    assert (config.attention_bias, config.mlp_bias) == (True, True)
    written = config_to_json(config)
    assert (written["attention_bias"], written["mlp_bias"]) == (True, True)
    assert config_from_json(written) == config
    nothing = {**LLAMA, "attention_bias": None, "mlp_bias": None}
    assert config_from_json(nothing) == config_from_json(LLAMA)
    # Qwen2's are where they are, whatever its file says.
    for said in (False, True):
        qwen2 = config_from_json({**LLAMA, "model_type": "qwen2", "attention_bias": said})
        assert (qwen2.has_biases, qwen2.attention_bias) == (True, False)


QWEN2 = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}
WINDOWS = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "changes",
    [
        {**QWEN2, "use_sliding_window": False},
        {**QWEN2, "sliding_window": None},
        {**QWEN2, "sliding_window": 128, "max_window_layers": 0},
        {**QWEN2, "max_window_layers": 2},
        # There are 28 such layers, where it does not say so.
        QWEN2,
        {**QWEN2, "max_window_layers": 0, "layer_types": ["full_attention"] * 2},
        {**QWEN2, "sliding_window": 128, "layer_types": WINDOWS},
        {**QWEN3_MOE, "use_sliding_window": True},
        {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 128},
        QWEN2_MOE,
        {**QWEN2_MOE, "use_sliding_window": True, "max_window_layers": 0},
    ],
)
def test_windows_in_which_each_text_has_room_are_full_attention(changes: dict[str, Any]) -> None:
    content = {**changes, "layer_types": list(changes["layer_types"])} if "layer_types" in changes else changes
    without = {name: value for name, value in content.items() if name not in ("layer_types", "use_sliding_window")}
    assert config_from_json(content) == config_from_json(without)
    # Nothing says that there were any.
    assert (
        not {"use_sliding_window", "sliding_window", "layer_types"} & config_to_json(config_from_json(content)).keys()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {**QWEN2, "max_window_layers": 0},
        {**QWEN2, "max_window_layers": 1},
        {**QWEN2, "max_window_layers": 2, "layer_types": [*WINDOWS]},
        {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 64},
        # It counts the layers that may have windows from the other end.
        {**QWEN2_MOE, "use_sliding_window": True, "max_window_layers": 2},
    ],
)
def test_windows_that_leave_tokens_out_are_refused(changes: dict[str, Any]) -> None:
    told = "less than the 128 of max_position_embeddings; .*: set max_position_embeddings to 64 to"
    with pytest.raises(Unusable, match=f"^config.json: sliding_window is 64, {told}"):
        config_from_json(changes)
    assert config_from_json({**changes, "max_position_embeddings": 64}).max_position_embeddings == 64


@pytest.mark.parametrize("window", ["64", None])
def test_a_window_that_is_no_number_is_told(window: object) -> None:
    changes = {**QWEN2, "layer_types": [*WINDOWS], "sliding_window": window}
    with pytest.raises(Unusable, match=rf"^config\.json: sliding_window is {window!r}; .* a whole number is needed$"):
        config_from_json(changes)


def test_windows_without_a_number_of_positions_are_told_that_it_is_missing() -> None:
    without = {name: value for name, value in QWEN2.items() if name != "max_position_embeddings"}
    with pytest.raises(Unusable, match=r"^config\.json: max_position_embeddings is missing$"):
        config_from_json({**without, "max_window_layers": 0})


def test_greedy_experts_have_no_groups() -> None:
    assert config_from_json({**DEEPSEEK, "n_group": 4, "topk_group": 2}).n_group == 1
    limited = {**DEEPSEEK, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
    assert config_from_json(limited).n_group == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; the families that are built here are deepseek_v2"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; the families that are built here are deepseek_v2"),
        ({"attention_bias": "yes"}, "attention_bias: Input should be a valid boolean, found 'yes'"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias is true; it is a key of llama, not of a qwen3; "),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'; of quantized weights, fp8 with a"),
        ({"quantization_config": "fp8"}, "quant_method is None"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is None; the rows and columns that"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
            r"weight_block_size is \[128, 0\]",
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling is of the type 'longrope'"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; a mapping is needed"),
        ({"rope_parameters": ["yarn"]}, r"rope_parameters is \['yarn'\]; a mapping is needed"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling is of the type \['yarn'\]"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; of a llama, 1 is built"),
        ({"layer_types": ["chunked_attention"]}, "layer_types has chunked_attention"),
        ({"layer_types": 5}, "layer_types is 5; a list is needed"),
        ({"layer_types": [5, None]}, "layer_types has 5, None"),
        ({"bos_token_id": None, "eos_token_id": None}, "neither bos_token_id nor eos_token_id"),
        ({"vocab_size": "many"}, "vocab_size: Input should be a valid integer, found 'many'"),
        ({"head_dim": 25}, "head_dim is 25; RoPE turns pairs"),
        ({"hidden_size": 2**62}, "hidden_size: Input should be less than or equal to 262144, found 46116860184"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings: Input should be less than or equal to 1677721"),
        ({"max_position_embeddings": 2**24, "head_dim": 256}, "max_position_embeddings 16,777,216 is too many for"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Unusable, match=f"^config.json: .*{said}"):
        config_from_json({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; of a qwen3_moe, 1 is built here"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; of a qwen3_moe, \[\] is built here"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_experts 8"),
        ({"num_experts": None}, "num_experts: Input should be a valid integer, found None"),
        ({"num_experts": None, "num_local_experts": 8.5}, "num_experts: Input should be a valid integer, found 8.5"),
    ],
)
def test_experts_that_are_not_built_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Unusable, match=f"^config.json: .*{said}"):
        config_from_json({**QWEN3_MOE, **changes})


@pytest.mark.parametrize(
    ("content", "changes", "said"),
    [
        (QWEN2_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; of a qwen2_moe, 1 is built here"),
        (QWEN2_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; of a qwen2_moe, \[\] is built here"),
        (QWEN2_MOE, {"qkv_bias": False}, "qkv_bias is False; of a qwen2_moe, True is built here"),
        (QWEN2_MOE, {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size is missing; add it, "),
        (QWEN3_MOE, {"shared_expert_intermediate_size": 88}, "shared_expert_intermediate_size is 88; it is a key of q"),
    ],
)
def test_a_shared_expert_is_of_its_family(content: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Unusable, match=f"^config.json: .*{said}"):
        config_from_json({**content, **changes})


def test_what_a_mixture_leaves_out_is_as_in_transformers() -> None:
    for content in (QWEN2_MOE, QWEN3_MOE):
        without = {name: value for name, value in content.items() if name != "num_key_value_heads"}
        theirs = AutoConfig.for_model(**without).num_key_value_heads
        config = config_from_json({**without, "num_attention_heads": 16, "head_dim": 16})
        assert (config.num_key_value_heads, config.has_biases) == (theirs, content is QWEN2_MOE)


def test_the_order_of_keys_stays_that_of_older_versions() -> None:
    # Equal models have equal bytes, so a version can be told to be the same.
    assert list(config_to_json(config_from_json(LLAMA))) == [
        "dtype", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "model_type", "hidden_size",
        "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling",
        "intermediate_size", "tie_word_embeddings", "initializer_range", "rms_norm_eps", "architectures",
        "attention_bias", "rope_parameters", "hidden_act", "pad_token_id",
    ]  # fmt: skip


def test_a_missing_size_is_named() -> None:
    with pytest.raises(Unusable, match="vocab_size is missing; kv_lora_rank is missing"):
        config_from_json({key: value for key, value in DEEPSEEK.items() if key not in ("kv_lora_rank", "vocab_size")})
    with pytest.raises(Unusable, match="num_experts is missing"):
        config_from_json({key: value for key, value in QWEN3_MOE.items() if key != "num_experts"})


@pytest.mark.parametrize(
    ("family", "method", "scores"),
    [("deepseek_v3", "noaux_tc", "sigmoid"), ("deepseek_v2", "group_limited_greedy", "softmax")],
)
def test_how_experts_are_chosen_is_named_as_it_is_in_what_is_published(family: str, method: str, scores: str) -> None:
    # Runtimes other than transformers go by these keys, and have no biases for experts without them.
    # V2's published ones and V3's differ in more than these, but in nothing that is refused.
    groups = {"n_group": 4, "topk_group": 2, "topk_method": method, "scoring_func": scores}
    written = config_to_json(config_from_json({**DEEPSEEK, **groups, "model_type": family}))
    told = written["topk_method"], written["scoring_func"], written["moe_layer_freq"]
    assert told == (method, scores, 1)
    assert config_from_json(written).model_type == family
