"""``config.json`` in Hugging Face's terms, as it is written here and as published checkpoints have it, without torch.

What changes the numbers and is not built here is refused by name; what does not change them is passed over.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from lm.config import (
    QWEN2,
    Architecture,
    DynamicScaling,
    GroupedMixtureConfig,
    LatentConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)

_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_CONFIGS: dict[str, type[ModelConfig]] = {
    family: kind for kind in get_args(ModelConfig) for family in get_args(kind.model_fields["model_type"].annotation)
}
_SCALINGS: dict[str, type[RopeScaling]] = {
    "llama3": Llama3Scaling,
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
}
# What transformers takes where a configuration does not say.
_DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
_ROPE_THETA = 10000.0
_QWEN3_HEAD_DIM = 128
_KEY_VALUE_HEADS = {"qwen2_moe": 16, "qwen3_moe": 4}
_SLIDING_WINDOW, _MAX_WINDOW_LAYERS = 4096, 28
# Values that are built here; a key that is missing or null is one of them.
_BUILT: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
}
_WITHOUT_BIASES: dict[str, tuple[object, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
# Each layer has experts.
_ALL_HAVE_EXPERTS: dict[str, tuple[object, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
_BUILT_OF: dict[str, dict[str, tuple[object, ...]]] = {
    "deepseek_v2": {
        **_WITHOUT_BIASES,
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
    },
    "deepseek_v3": {**_WITHOUT_BIASES, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    "qwen2_moe": {"qkv_bias": (True,), **_ALL_HAVE_EXPERTS},
    "qwen3_moe": {"mlp_bias": (False,), **_ALL_HAVE_EXPERTS},
}
_SLIDING = "sliding_attention"
# Of DeepSeek's architecture, written at another place of the file or only where it is set.
_APART = {"rope_scaling", "tie_word_embeddings"}
# Rows and columns that have one scale.
Block = tuple[int, int]


class Unusable(ValueError):
    """A checkpoint that cannot be loaded. The message is one line that names the file and what is wrong in it."""


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Returns ``config.json`` as transformers reads it."""
    dumped = config.model_dump(exclude={"training_length"} if config.training_length is None else None)
    own: dict[str, Any] = {"architectures": [_ARCHITECTURES[config.model_type]]}
    if isinstance(config, LatentConfig):
        dumped = {name: value for name, value in dumped.items() if name not in _APART}
        own |= {
            "num_key_value_heads": config.num_attention_heads,
            "head_dim": config.qk_rope_head_dim,
            "attention_bias": False,
            "rope_interleave": True,
        }
        # transformers knows these by the family; others, vLLM among them, take V2's where V3's are not named.
        if config.has_bias:
            own |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
        else:
            method = "greedy" if config.n_group == config.topk_group else "group_limited_greedy"
            own |= {"topk_method": method, "scoring_func": "softmax", "moe_layer_freq": 1}
    else:
        # Without what is of no model but a few: older versions did not write it, and equal models keep their bytes.
        del dumped["attention_bias"]
        for name in ("mlp_bias", "shared_expert_intermediate_size"):
            if not dumped.get(name):
                dumped.pop(name, None)
        own["attention_bias"] = config.has_biases
        # The feed-forward's sizes stand before these: so they did in older versions.
        dumped |= {name: dumped.pop(name) for name in ("tie_word_embeddings", "initializer_range", "rms_norm_eps")}
        if isinstance(config, GroupedMixtureConfig):
            own |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    scaling = config.rope_scaling
    stretched = None if scaling is None else scaling.model_dump(exclude_none=True)
    return {
        "dtype": "float32",
        **dumped,
        **own,
        # transformers 5 reads the nested values, earlier releases the flat ones.
        "rope_parameters": {**(stretched or {"rope_type": "default"}), "rope_theta": config.rope_theta},
        "rope_scaling": stretched,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": config.eos_token_id,
    }


def config_from_json(content: Mapping[str, Any]) -> ModelConfig:
    """Returns the part of ``config.json`` that shapes the model. Raises :class:`Unusable` that names each key."""
    family = content.get("model_type")
    if not isinstance(family, str) or family not in _ARCHITECTURES:
        built = ", ".join(sorted(_ARCHITECTURES))
        raise Unusable(f"config.json: model_type is {family!r}; the families that are built here are {built}")
    _refuse_what_is_not_built(content, family)
    block_of(content)
    kind = _CONFIGS[family]
    known: dict[str, Any] = {name: content[name] for name in kind.model_fields if name in content}
    if family in QWEN2:
        # They have their biases whatever this says.
        known["attention_bias"] = False
    missing = _DEFAULTS | _ids(content) | (_latent(content) if kind is LatentConfig else _grouped(content))
    known |= {name: value for name, value in missing.items() if known.get(name) is None}
    for name in ("bos_token_id", "eos_token_id"):
        # Llama 3 and others name several ends; the first one ends a text.
        known[name] = known[name][0] if isinstance(known[name], list) and known[name] else known[name]
    known["rope_theta"], known["rope_scaling"] = _rope(content)
    if kind is LatentConfig and content.get("topk_method") == "greedy":
        known["n_group"] = known["topk_group"] = 1
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise Unusable("config.json: " + "; ".join(_told(fault) for fault in error.errors())) from None


def architecture_of(config: ModelConfig) -> Architecture:
    """Returns what a user could have chosen, without what the tokenizer and the training added."""
    kind: type[Architecture] = next(kind for kind in get_args(Architecture) if isinstance(config, kind))
    return kind.model_validate(config.model_dump(include=set(kind.model_fields)))


def block_of(config: Mapping[str, Any]) -> Block | None:
    """Returns the blocks of a ``config.json`` whose weights are in FP8 (:mod:`lm.fp8`), None for unquantized ones.

    Raises :class:`Unusable` for what is quantized in another way.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method != "fp8":
        raise Unusable(
            f"config.json: quantization_config: quant_method is {method!r}; of quantized weights, fp8 with a scale for "
            "each block is read here; take that or the unquantized ones"
        )
    match found.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case other:
            raise Unusable(
                f"config.json: quantization_config: weight_block_size is {other!r}; the rows and columns that have one "
                "scale are needed, such as [128, 128]"
            )


def _refuse_what_is_not_built(content: Mapping[str, Any], family: str) -> None:
    for key, values in {**_BUILT, **_BUILT_OF.get(family, {})}.items():
        found = content.get(key)
        if found is None or found in values:
            continue
        told = " or ".join(repr(value) for value in values)
        raise Unusable(f"config.json: {key} is {found!r}; of a {family}, {told} is built here")
    layers = content.get("layer_types") or []
    if not isinstance(layers, list):
        raise Unusable(f"config.json: layer_types is {layers!r}; a list is needed")
    if others := sorted({str(layer) for layer in layers} - {"full_attention", _SLIDING}):
        raise Unusable(f"config.json: layer_types has {', '.join(others)}; full_attention alone is built here")
    if _has_windows(content, layers):
        _check_window(content)


def _has_windows(content: Mapping[str, Any], layers: Sequence[object]) -> bool:
    """Whether a layer attends to a window before each token alone: so it is read by transformers."""
    if _SLIDING in layers:
        return True
    if not content.get("use_sliding_window") or content.get("sliding_window", _SLIDING_WINDOW) is None:
        return False
    if content["model_type"] == "qwen3_moe":
        return True
    full, count = content.get("max_window_layers", _MAX_WINDOW_LAYERS), content.get("num_hidden_layers")
    if content["model_type"] == "qwen2_moe":
        # Each second one of so many layers has windows, the first one first.
        return not layers and full != 0
    # Those before so many layers attend to all.
    return not layers and not (isinstance(full, int) and isinstance(count, int) and full >= count)


def _check_window(content: Mapping[str, Any]) -> None:
    """Raises :class:`Unusable` where a window leaves out a token that a text has room for, or is none."""
    window, positions = content.get("sliding_window", _SLIDING_WINDOW), content.get("max_position_embeddings")
    if not isinstance(window, int):
        raise Unusable(
            f"config.json: sliding_window is {window!r}; where use_sliding_window is true or layer_types has "
            f"{_SLIDING}, a whole number is needed"
        )
    if isinstance(positions, int) and window < positions:
        raise Unusable(
            f"config.json: sliding_window is {window!r}, less than the {positions!r} of max_position_embeddings; "
            f"windows that leave tokens out are not built here: set max_position_embeddings to {window!r} to use it "
            "for texts as long as that alone"
        )


def _ids(content: Mapping[str, Any]) -> dict[str, Any]:
    # Families without a token for the beginning begin a text with the one that ends the text before.
    bos, eos = content.get("bos_token_id"), content.get("eos_token_id")
    if bos is None and eos is None:
        raise Unusable("config.json: it names neither bos_token_id nor eos_token_id; add the one that ends a text")
    return {"bos_token_id": eos, "eos_token_id": bos}


def _latent(content: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0}
    if content["model_type"] == "deepseek_v2":
        found |= {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    return found


def _grouped(content: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = content.get("num_attention_heads"), content.get("hidden_size")
    found: dict[str, Any] = {"num_key_value_heads": heads, "attention_bias": False}
    if _CONFIGS[content["model_type"]] is GroupedMixtureConfig:
        found |= {"norm_topk_prob": False, "num_key_value_heads": _KEY_VALUE_HEADS[content["model_type"]]}
        # Releases of transformers from 5 on write this name.
        if "num_local_experts" in content:
            found["num_experts"] = content["num_local_experts"]
    else:
        found["mlp_bias"] = False
    if content["model_type"] == "qwen3":
        found["head_dim"] = _QWEN3_HEAD_DIM
    elif isinstance(heads, int) and isinstance(width, int) and heads > 0:
        found["head_dim"] = width // heads
    return found


def _rope(content: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Returns the base of the rotations and how they are stretched, from the nested or the older flat form.

    Of both, the older one holds, as in transformers: model cards say to add it to what is there.
    """
    older, nested = (content.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    for key, found in (("rope_scaling", older), ("rope_parameters", nested)):
        if not isinstance(found, dict):
            raise Unusable(f"config.json: {key} is {found!r}; a mapping is needed")
    given = older or nested
    theta = given.get("rope_theta") or content.get("rope_theta") or _ROPE_THETA
    if (other := nested.get("rope_theta") or theta) != theta:
        raise Unusable(
            f"config.json: rope_parameters has the rope_theta {other}, and rope_scaling, which is read in its place, "
            f"is without it, so that it would be {theta}; write it into rope_scaling"
        )
    if (share := given.get("partial_rotary_factor") or 1) != 1:
        raise Unusable(
            f"config.json: partial_rotary_factor is {share!r}; of a {content['model_type']}, 1 is built here"
        )
    # Releases before 4.43 called it type.
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return theta, None
    known = ["yarn"] if _CONFIGS[content["model_type"]] is LatentConfig else list(_SCALINGS)
    if kind not in known:
        raise Unusable(
            f"config.json: rope_scaling is of the type {kind!r}; of a {content['model_type']} not built here"
        )
    if given.get("truncate") is False:
        raise Unusable("config.json: rope_scaling.truncate is false; true alone is built here")
    fields = _SCALINGS[kind].model_fields
    stretched = {name: given[name] for name in fields if given.get(name) is not None}
    length = content.get("original_max_position_embeddings") or content.get("max_position_embeddings")
    before = {"original_max_position_embeddings": length} if "original_max_position_embeddings" in fields else {}
    return theta, {**before, **stretched, "rope_type": kind}


def _told(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{where} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, found {fault['input']!r}" if where else message
