"""A model's shape in the metadata of GGUF, under the keys of llama.cpp's architectures. Imports no torch."""

import math
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np
from pydantic import ValidationError

from lm.config import (
    GroupedConfig,
    GroupedMixtureConfig,
    GroupedShape,
    LatentConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
)
from lm.gguf_tensors import MLP_BIAS, OUTPUT_BIAS, Array, Unfit, rope_factors, takes_plain_queries

Value = int | float | bool | str
_Stretched = TypeVar("_Stretched", YarnScaling, Llama3Scaling)

# llama.cpp's names for DeepSeek-V2 and V3, and for Qwen3 with experts.
_LATENT = "deepseek2"
_GROUPED_MIXTURE = "qwen3moe"
ARCHITECTURES = (_LATENT, *get_args(GroupedConfig.model_fields["model_type"].annotation), _GROUPED_MIXTURE)
# How V2's and V3's routers score experts.
_SOFTMAX, _SIGMOID = 1, 2
_DENSE_KEY = "feed_forward_length"
_SPLIT = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
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
_KEYS: dict[type[ModelConfig], dict[str, str]] = {
    GroupedConfig: _GROUPED,
    GroupedMixtureConfig: {
        **{key: name for key, name in _GROUPED.items() if key != _DENSE_KEY},
        "expert_feed_forward_length": "moe_intermediate_size",
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
# What other programs leave out means this.
_UNSAID: dict[str, Value | None] = {
    "rope_theta": 10000.0,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
# What llama.cpp has no key for: ours, so that a model that comes back is the one that went.
_OWN = "overnight."
_YARN, _MULTIPLIER = "rope.scaling.", "yarn_log_multiplier"
_OLDER_FACTOR = "rope.scale_linear"
# It knows keys for them, and writes the same text whatever they say (a llama in xllamacpp 2026.10.11549).
_BETAS = (32.0, 1.0)
# Beside the one that eos is, it takes these two for ends of a text, and tokens of these names in any file.
_FURTHER_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_EOM = "<|eom_id|>"
_NAMED_ENDS = {
    *(_EOM, "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>"),
    *("<EOT>", "_<EOT>", "<|end_of_text|>"),
}
_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def architecture(config: ModelConfig) -> str:
    """Returns what llama.cpp calls the family of ``config``."""
    if isinstance(config, GroupedMixtureConfig):
        return _GROUPED_MIXTURE
    return _LATENT if isinstance(config, LatentConfig) else config.model_type


def metadata(config: ModelConfig) -> dict[str, Value]:
    """Returns keys and values that describe ``config``."""
    if config.model_type == "deepseek_v2" and isinstance(config, LatentConfig) and config.topk_group < config.n_group:
        raise Unfit("llama.cpp chooses a DeepSeek-V2's groups of experts otherwise, and there are some here")
    if isinstance(config.rope_scaling, Llama3Scaling) and config.model_type != "llama":
        raise Unfit(f"llama.cpp reads Llama 3's rope_scaling of no {config.model_type}; --to hf writes it")
    if isinstance(config, GroupedMixtureConfig) and not config.norm_topk_prob:
        raise Unfit("llama.cpp normalizes the weights of a qwen3moe's experts, and norm_topk_prob is false here")
    if isinstance(config, GroupedShape) and config.attention_bias and config.model_type != "llama":
        raise Unfit(f"llama.cpp reads an attention_bias on outputs of no {config.model_type}; --to hf writes it")
    named: dict[str, Value] = {
        key: value for key, name in _KEYS[type(config)].items() if (value := getattr(config, name)) is not None
    }
    named["vocab_size"] = config.vocab_size
    if isinstance(config, LatentConfig):
        named |= {
            # Attention happens in the latent's space, where one key, and one value in it, serve all heads.
            "attention.head_count_kv": 1,
            "attention.key_length": config.cache_width,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": config.qk_head_dim,
            "expert_gating_func": _SIGMOID if config.has_bias else _SOFTMAX,
        }
        own: dict[str, Value] = {}
        if config.q_lora_rank is None and not takes_plain_queries(config.num_hidden_layers):
            named["attention.q_lora_rank"] = config.hidden_size
            own["plain_queries"] = True
        if config.q_lora_rank is not None and takes_plain_queries(config.num_hidden_layers):
            raise Unfit("llama.cpp reads latent models of 26 and 27 layers without a q_lora_rank alone")
    else:
        if config.model_type == "qwen2" and config.num_attention_heads * config.head_dim != config.hidden_size:
            raise Unfit("llama.cpp reads a qwen2 alone whose hidden_size is num_attention_heads x head_dim")
        named |= {"attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim}
        own = {}
    if config.rope_scaling is not None:
        own |= config.rope_scaling.model_dump(exclude_none=True)
    if isinstance(config.rope_scaling, YarnScaling):
        named |= _stretched(config.rope_scaling, isinstance(config, LatentConfig))
    if isinstance(config.rope_scaling, LinearScaling):
        named |= {f"{_YARN}type": "linear", f"{_YARN}factor": config.rope_scaling.factor}
    own["initializer_range"] = config.initializer_range
    prefix = architecture(config)
    return {f"{prefix}.{key}": value for key, value in named.items()} | {f"{_OWN}{key}": own[key] for key in own}


class Ends(NamedTuple):
    """The tokens that end a text beside eos, as a GGUF file tells them: none, one or two of its keys.

    ``untold`` are those that it has no key for, and that llama.cpp does not know by their names.
    """

    eot: int | None
    eom: int | None
    untold: list[int]


def further_ends(ends: Sequence[int], eos: int, tokens: Sequence[str]) -> Ends:
    """Returns what ``ends`` has beside ``eos``; ``tokens`` are the names of all tokens."""
    further = [end for end in dict.fromkeys(ends) if end != eos and end < len(tokens)]
    if len(further) > len(_FURTHER_ENDS):
        further.sort(key=lambda end: tokens[end] in _NAMED_ENDS)
    told = further[: len(_FURTHER_ENDS)]
    eom = next((end for end in told if tokens[end] == _EOM), None)
    others = [end for end in told if end != eom]
    return Ends(
        eot=others[0] if others else None,
        eom=others[1] if len(others) > 1 else eom,
        untold=[end for end in further[len(told) :] if tokens[end] not in _NAMED_ENDS],
    )


def told_ends(found: Mapping[str, Any], vocab_size: int) -> list[int]:
    """Returns what ends a text beside eos, as ``found`` tells; as llama.cpp does, it passes over what is no token."""
    ends = [found.get(key) for key in _FURTHER_ENDS]
    return [end for end in ends if isinstance(end, int) and 0 <= end < vocab_size]


def files_of(path: Path) -> list[Path]:
    """Returns the files of a model of which ``path`` is the first: itself, or those that llama.cpp has split it into.

    Those are named MODEL-00001-of-00003.gguf and so on. Raises :class:`Unfit` where one is missing.
    """
    named = _SPLIT.fullmatch(path.name)
    if named is None or not int(named["count"]):
        return [path]
    count = int(named["count"])
    files = [path.with_name(f"{named['name']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if path != files[0]:
        raise Unfit(f"it is a part of a model; the first part is {files[0].name}")
    if missing := [file.name for file in files if not file.is_file()]:
        raise Unfit(f"it is the first of {count} parts, and {missing[0]} is missing beside it")
    return files


def config_from(
    found: Mapping[str, Any],
    embedding: tuple[int, ...],
    tied: bool,
    factors: Array | None,
    tensors: Container[str] = (),
) -> ModelConfig:
    """Returns the shape that the metadata ``found`` describe.

    ``embedding`` is that tensor's shape [vocabulary, hidden size], ``tied`` says whether it is the head as well, and
    ``factors`` are those of the tensor ``rope_freqs``. No key says that layers have biases: that they are among the
    names ``tensors`` does. Raises :class:`Unfit` for what :mod:`lm.config` cannot tell.
    """
    family = found.get("general.architecture", "")
    if family not in ARCHITECTURES:
        raise Unfit(f"its architecture is {family!r}; known are {', '.join(ARCHITECTURES)}")
    said = {key.removeprefix(f"{family}."): value for key, value in found.items() if key.startswith(f"{family}.")}
    kinds: dict[str, type[ModelConfig]] = {_LATENT: LatentConfig, _GROUPED_MIXTURE: GroupedMixtureConfig}
    kind = kinds.get(family, GroupedConfig)
    if each := [key for key in _KEYS[kind] if isinstance(said.get(key), list)]:
        raise Unfit(f"its {each[0]} has a number for each layer; a model with one for all alone can be read")
    if kind is LatentConfig:
        # Until April 2025 llama.cpp had keys and values of a latent model expanded, and no other lengths of them.
        older = {f"{key}_mla": said[key] for key in ("attention.key_length", "attention.value_length") if key in said}
        said = {**older, **said}
    for key in ("embedding_length", "attention.head_count"):
        _check_number(said, family, key)
    values: dict[str, Any] = {name: said.get(key, _UNSAID.get(name, ...)) for key, name in _KEYS[kind].items()}
    values |= {
        "model_type": _latent_family(said)
        if family == _LATENT
        else {_GROUPED_MIXTURE: "qwen3_moe"}.get(family, family),
        "vocab_size": embedding[0],
        "initializer_range": found.get(f"{_OWN}initializer_range", 0.02),
        "eos_token_id": (end := found.get("tokenizer.ggml.eos_token_id", ...)),
        "bos_token_id": found.get("tokenizer.ggml.bos_token_id", end),
    }
    values["tie_word_embeddings"] = tied
    if kind is LatentConfig:
        values |= _of_latent_heads(found, said, family)
    else:
        values |= _of_grouped_heads(values, said)
        if kind is GroupedMixtureConfig:
            values["norm_topk_prob"] = True
        if family == "llama":
            values |= {"attention_bias": OUTPUT_BIAS in tensors, "mlp_bias": MLP_BIAS in tensors}
    values["rope_scaling"] = _told_scaling(found, said, family)
    if factors is not None and values["rope_scaling"] is not None:
        raise Unfit(f"it has rope_freqs.weight and a {_YARN}factor; a model that is stretched in one way can be read")
    if missing := [key for key, name in _KEYS[kind].items() if values[name] is ...]:
        raise Unfit(f"its metadata lack {family}.{missing[0]}")
    try:
        config = kind.model_validate(_without_blanks(values))
        if isinstance(config, GroupedShape) and factors is not None:
            return config.model_copy(update={"rope_scaling": _scaling(found, config, factors)})
        return config
    except ValidationError as error:
        raise _no_model(error) from None


def _no_model(error: ValidationError, prefix: str = "") -> Unfit:
    """Returns the first fault of ``error``, whose values lay under keys that begin with ``prefix``."""
    first = error.errors()[0]
    told = first["msg"].removeprefix("Value error, ")
    where = ".".join(str(step) for step in first["loc"])
    return Unfit(f"its metadata make no model: {prefix + where + ': ' if where else ''}{told}")


def _latent_family(said: Mapping[str, Any]) -> str:
    # Files of V2 that are older than V3 do not say how experts are scored.
    scored = said.get("expert_gating_func", _SOFTMAX)
    if scored not in (_SOFTMAX, _SIGMOID):
        raise Unfit(f"its expert_gating_func is {scored}; a model with {_SOFTMAX} or {_SIGMOID} alone can be read")
    return "deepseek_v3" if scored == _SIGMOID else "deepseek_v2"


def _of_latent_heads(found: Mapping[str, Any], said: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Returns the widths of a latent model's heads that no single key says."""
    values: dict[str, Any] = {"q_lora_rank": None} if found.get(f"{_OWN}plain_queries") else {}
    if "attention.key_length_mla" in said:
        for key in ("attention.key_length_mla", "rope.dimension_count"):
            _check_number(said, family, key)
        return values | {"qk_nope_head_dim": said["attention.key_length_mla"] - said["rope.dimension_count"]}
    return values | {"qk_nope_head_dim": ...}


def _of_grouped_heads(values: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the width and the number of a grouped model's heads, of which ``values`` are what its metadata say."""
    heads, width = values["num_key_value_heads"], values["head_dim"]
    if width is ...:
        width = values["hidden_size"] // said["attention.head_count"]
    _same(said, "attention.value_length", width)
    _same(said, "rope.dimension_count", width)
    return {"head_dim": width, "num_key_value_heads": said["attention.head_count"] if heads is ... else heads}


def _told_scaling(found: Mapping[str, Any], said: Mapping[str, Any], family: str) -> dict[str, Any] | None:
    """Returns the ``rope_scaling`` that the metadata tell; that of Llama 3 lies in a tensor."""
    readers = {"yarn": _yarn, "linear": _linear}
    # llama.cpp takes a factor without a type for linear, and knows an older name of it.
    is_linear = any(key in said for key in (f"{_YARN}factor", _OLDER_FACTOR))
    read = readers.get(str(said.get(f"{_YARN}type", "linear" if is_linear else "none")))
    if read is None:
        _same(said, f"{_YARN}type", "none")
        # llama.cpp knows no such thing, and stretches no text that the model has positions for either.
        is_dynamic = found.get(f"{_OWN}rope_type") == "dynamic"
        return {"rope_type": "dynamic", "factor": found.get(f"{_OWN}factor")} if is_dynamic else None
    return read(found, said, family)


def _stretched(scaling: YarnScaling, latent: bool) -> dict[str, Value]:
    """Returns the keys for YaRN.

    llama.cpp multiplies rotations by 1 + 0.1 ln(factor), and a latent model's by nothing: there it multiplies scores.
    """
    if latent and not (scaling.mscale_all_dim and math.isclose(scaling.rotation_scale, 1.0)):
        raise Unfit(
            "llama.cpp reads YaRN of a latent model alone whose mscale and mscale_all_dim are one number above 0, "
            "without an attention_factor"
        )
    if not latent and not math.isclose(scaling.rotation_scale, 1.0 + 0.1 * math.log(scaling.factor)):
        raise Unfit("llama.cpp scales YaRN's rotations by 1 + 0.1 ln(factor), and rope_scaling says something else")
    if (scaling.beta_fast, scaling.beta_slow) != _BETAS:
        raise Unfit("llama.cpp takes YaRN's beta_fast as {:g} and beta_slow as {:g}".format(*_BETAS))
    found: dict[str, Value] = {
        f"{_YARN}type": "yarn",
        f"{_YARN}factor": scaling.factor,
        f"{_YARN}original_context_length": scaling.original_max_position_embeddings,
    }
    return found | ({f"{_YARN}{_MULTIPLIER}": 0.1 * (scaling.mscale_all_dim or 0.0)} if latent else {})


# What fp32 cannot hold is told without numpy's warning.
@np.errstate(over="ignore")
def _yarn(found: Mapping[str, Any], said: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Returns what :func:`_stretched` wrote, or another program."""
    others = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": _BETAS[0], "yarn_beta_slow": _BETAS[1]}
    for key, expected in others.items():
        _same(said, f"{_YARN}{key}", expected)
    latent = family == _LATENT
    for key in ("factor", _MULTIPLIER) if latent else ("factor",):
        _check_number(said, family, f"{_YARN}{key}", "with YaRN ")
    own = {name: found[f"{_OWN}{name}"] for name in YarnScaling.model_fields if f"{_OWN}{name}" in found}
    if own:
        scaling = _valid(YarnScaling, own)
        for key, value in _stretched(scaling, latent).items():
            there = said.get(key)
            # numpy would compare each number of a list.
            if isinstance(there, list) or there != (value if isinstance(value, str) else _in_fp32(key, value)):
                raise Unfit(f"its {key} is {there}, and Overnight's own keys beside it make it {value}")
        return own
    values = {
        "rope_type": "yarn",
        "factor": said[f"{_YARN}factor"],
        "original_max_position_embeddings": said.get(f"{_YARN}original_context_length", said.get("context_length")),
    }
    if latent:
        # The shortest number that is the same in fp32.
        values["mscale"] = values["mscale_all_dim"] = float(str(np.float32(10 * said[f"{_YARN}{_MULTIPLIER}"])))
    return values


@np.errstate(over="ignore")
def _linear(found: Mapping[str, Any], said: Mapping[str, Any], family: str) -> dict[str, Any]:
    key = _OLDER_FACTOR if f"{_YARN}factor" not in said and _OLDER_FACTOR in said else f"{_YARN}factor"
    _check_number(said, family, key, "with linear scaling ")
    own = found.get(f"{_OWN}factor", said[key])
    if not isinstance(own, int | float) or _in_fp32(key, own) != np.float32(said[key]):
        raise Unfit(f"its {key} is {said[key]}, and Overnight's own key beside it says {own!r}")
    return {"rope_type": "linear", "factor": float(own)}


def _valid(kind: type[_Stretched], own: Mapping[str, Any]) -> _Stretched:
    try:
        return kind.model_validate(own)
    except ValidationError as error:
        raise _no_model(error, _OWN) from None


def _in_fp32(key: str, value: float) -> np.float32:
    if not np.isfinite(found := np.float32(value)):
        raise Unfit(f"its {key} would have to be {value:g}, which fp32 cannot hold")
    return found


@np.errstate(over="ignore")
def _scaling(found: Mapping[str, Any], config: GroupedShape, factors: Array) -> Llama3Scaling:
    own = {name: found[f"{_OWN}{name}"] for name in Llama3Scaling.model_fields if f"{_OWN}{name}" in found}
    # GGUF keeps the factors, not what they were computed from; Llama 3.1 to 3.3 differ in the largest one alone.
    if own:
        scaling = _valid(Llama3Scaling, own)
    else:
        scaling = Llama3Scaling.model_validate({**_LLAMA_3, "factor": float(factors.max())})
    expected = rope_factors(config.head_dim, config.rope_theta, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise Unfit("its rope_freqs.weight are not those of Llama 3.1, 3.2 or 3.3, nor of a file that Overnight wrote")
    return scaling


def _check_number(said: Mapping[str, Any], family: str, key: str, where: str = "") -> None:
    value = said.get(key)
    if not isinstance(value, int | float) or value <= 0:
        told = "lack" if value is None else f"say {value!r} for"
        raise Unfit(f"its metadata {told} {family}.{key}; {where}a number above 0 is needed")


def _same(said: Mapping[str, Any], key: str, expected: object) -> None:
    if key in said and said[key] != expected:
        raise Unfit(f"its {key} is {said[key]}; a model with {expected} alone can be read")


def _without_blanks(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not ...}
