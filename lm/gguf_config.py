"""Reads a model's shape from metadata of GGUF, whoever has written them. Imports no torch."""

from collections.abc import Container, Mapping
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from lm.config import (
    GroupedConfig,
    GroupedMixtureConfig,
    GroupedShape,
    LatentConfig,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
)
from lm.gguf_keys import (
    ARCHITECTURES,
    BETAS,
    FURTHER_ENDS,
    GROUPED_MIXTURES,
    KEYS,
    LATENT,
    MULTIPLIER,
    OWN,
    SCALING,
    SIGMOID,
    SOFTMAX,
    Value,
)
from lm.gguf_metadata import yarn_keys
from lm.gguf_tensors import MLP_BIAS, OUTPUT_BIAS, Array, Unfit, rope_factors

_Stretched = TypeVar("_Stretched", YarnScaling, Llama3Scaling)

# What other programs leave out means this.
_UNSAID: dict[str, Value | None] = {
    "rope_theta": 10000.0,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
_OLDER_FACTOR = "rope.scale_linear"
_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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
    mixtures = {name: model_type for model_type, name in GROUPED_MIXTURES.items()}
    kinds: dict[str, type[ModelConfig]] = {LATENT: LatentConfig, **dict.fromkeys(mixtures, GroupedMixtureConfig)}
    kind = kinds.get(family, GroupedConfig)
    if each := [key for key in KEYS[kind] if isinstance(said.get(key), list)]:
        raise Unfit(f"its {each[0]} has a number for each layer; a model with one for all alone can be read")
    if kind is LatentConfig:
        # Until April 2025 llama.cpp had keys and values of a latent model expanded, and no other lengths of them.
        older = {f"{key}_mla": said[key] for key in ("attention.key_length", "attention.value_length") if key in said}
        said = {**older, **said}
    for key in ("embedding_length", "attention.head_count"):
        _check_number(said, family, key)
    values: dict[str, Any] = {name: said.get(key, _UNSAID.get(name, ...)) for key, name in KEYS[kind].items()}
    values |= {
        "model_type": _latent_family(said) if family == LATENT else mixtures.get(family, family),
        "vocab_size": embedding[0],
        "initializer_range": found.get(f"{OWN}initializer_range", 0.02),
        "eos_token_id": (end := found.get("tokenizer.ggml.eos_token_id", ...)),
        "bos_token_id": found.get("tokenizer.ggml.bos_token_id", end),
    }
    values["tie_word_embeddings"] = tied
    if kind is LatentConfig:
        values |= _of_latent_heads(found, said, family)
    else:
        values |= _of_grouped_heads(values, said)
        if kind is GroupedMixtureConfig:
            values["norm_topk_prob"] = family == "qwen3moe"
        if family == "qwen3moe":
            # Others may say 0.
            values["shared_expert_intermediate_size"] = None
        if family == "llama":
            values |= {"attention_bias": OUTPUT_BIAS in tensors, "mlp_bias": MLP_BIAS in tensors}
    values["rope_scaling"] = _told_scaling(found, said, family)
    if factors is not None and values["rope_scaling"] is not None:
        raise Unfit(f"it has rope_freqs.weight and a {SCALING}factor; a model that is stretched in one way can be read")
    if missing := [key for key, name in KEYS[kind].items() if values[name] is ...]:
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
    scored = said.get("expert_gating_func", SOFTMAX)
    if scored not in (SOFTMAX, SIGMOID):
        raise Unfit(f"its expert_gating_func is {scored}; a model with {SOFTMAX} or {SIGMOID} alone can be read")
    return "deepseek_v3" if scored == SIGMOID else "deepseek_v2"


def _of_latent_heads(found: Mapping[str, Any], said: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Returns the widths of a latent model's heads that no single key says."""
    values: dict[str, Any] = {"q_lora_rank": None} if found.get(f"{OWN}plain_queries") else {}
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
    is_linear = any(key in said for key in (f"{SCALING}factor", _OLDER_FACTOR))
    read = readers.get(str(said.get(f"{SCALING}type", "linear" if is_linear else "none")))
    if read is None:
        _same(said, f"{SCALING}type", "none")
        # llama.cpp knows no such thing, and stretches no text that the model has positions for either.
        is_dynamic = found.get(f"{OWN}rope_type") == "dynamic"
        return {"rope_type": "dynamic", "factor": found.get(f"{OWN}factor")} if is_dynamic else None
    return read(found, said, family)


# What fp32 cannot hold is told without numpy's warning.
@np.errstate(over="ignore")
def _yarn(found: Mapping[str, Any], said: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Returns what :func:`yarn_keys` wrote, or another program."""
    others = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": BETAS[0], "yarn_beta_slow": BETAS[1]}
    for key, expected in others.items():
        _same(said, f"{SCALING}{key}", expected)
    latent = family == LATENT
    for key in ("factor", MULTIPLIER) if latent else ("factor",):
        _check_number(said, family, f"{SCALING}{key}", "with YaRN ")
    own = {name: found[f"{OWN}{name}"] for name in YarnScaling.model_fields if f"{OWN}{name}" in found}
    if own:
        scaling = _valid(YarnScaling, own)
        for key, value in yarn_keys(scaling, latent).items():
            there = said.get(key)
            # numpy would compare each number of a list.
            if isinstance(there, list) or there != (value if isinstance(value, str) else _in_fp32(key, value)):
                raise Unfit(f"its {key} is {there}, and Overnight's own keys beside it make it {value}")
        return own
    values = {
        "rope_type": "yarn",
        "factor": said[f"{SCALING}factor"],
        "original_max_position_embeddings": said.get(f"{SCALING}original_context_length", said.get("context_length")),
    }
    if latent:
        # The shortest number that is the same in fp32.
        values["mscale"] = values["mscale_all_dim"] = float(str(np.float32(10 * said[f"{SCALING}{MULTIPLIER}"])))
    return values


@np.errstate(over="ignore")
def _linear(found: Mapping[str, Any], said: Mapping[str, Any], family: str) -> dict[str, Any]:
    key = _OLDER_FACTOR if f"{SCALING}factor" not in said and _OLDER_FACTOR in said else f"{SCALING}factor"
    _check_number(said, family, key, "with linear scaling ")
    own = found.get(f"{OWN}factor", said[key])
    if not isinstance(own, int | float) or _in_fp32(key, own) != np.float32(said[key]):
        raise Unfit(f"its {key} is {said[key]}, and Overnight's own key beside it says {own!r}")
    return {"rope_type": "linear", "factor": float(own)}


def _valid(kind: type[_Stretched], own: Mapping[str, Any]) -> _Stretched:
    try:
        return kind.model_validate(own)
    except ValidationError as error:
        raise _no_model(error, OWN) from None


def _in_fp32(key: str, value: float) -> np.float32:
    if not np.isfinite(found := np.float32(value)):
        raise Unfit(f"its {key} would have to be {value:g}, which fp32 cannot hold")
    return found


@np.errstate(over="ignore")
def _scaling(found: Mapping[str, Any], config: GroupedShape, factors: Array) -> Llama3Scaling:
    own = {name: found[f"{OWN}{name}"] for name in Llama3Scaling.model_fields if f"{OWN}{name}" in found}
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


def told_ends(found: Mapping[str, Any], vocab_size: int) -> list[int]:
    """Returns what ends a text beside eos, as ``found`` tells; as llama.cpp does, it passes over what is no token."""
    ends = [found.get(key) for key in FURTHER_ENDS]
    return [end for end in ends if isinstance(end, int) and 0 <= end < vocab_size]
