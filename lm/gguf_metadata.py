"""Writes a model's shape as metadata of GGUF, for llama.cpp. Imports no torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from lm.config import (
    QWEN2,
    GroupedShape,
    LatentConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
)
from lm.gguf_keys import (
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
from lm.gguf_tensors import Unfit, takes_plain_queries

# llama.cpp takes tokens of these names for ends of a text in any file.
_EOM = "<|eom_id|>"
_NAMED_ENDS = {
    *(_EOM, "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>"),
    *("<EOT>", "_<EOT>", "<|end_of_text|>"),
}


def architecture(config: ModelConfig) -> str:
    """Returns what llama.cpp calls the family of ``config``."""
    return LATENT if isinstance(config, LatentConfig) else GROUPED_MIXTURES.get(config.model_type, config.model_type)


def metadata(config: ModelConfig) -> dict[str, Value]:
    """Returns keys and values that describe ``config``. Raises :class:`Unfit` where llama.cpp would not compute it."""
    if config.model_type == "deepseek_v2" and isinstance(config, LatentConfig) and config.topk_group < config.n_group:
        raise Unfit("llama.cpp chooses a DeepSeek-V2's groups of experts otherwise, and there are some here")
    if isinstance(config.rope_scaling, Llama3Scaling) and config.model_type != "llama":
        raise Unfit(f"llama.cpp reads Llama 3's rope_scaling of no {config.model_type}; --to hf writes it")
    if config.model_type == "qwen3_moe" and not config.norm_topk_prob:
        raise Unfit("llama.cpp normalizes the weights of a qwen3moe's experts, and norm_topk_prob is false here")
    if config.model_type == "qwen2_moe" and config.norm_topk_prob:
        raise Unfit("llama.cpp normalizes no weights of a qwen2moe's experts, and norm_topk_prob is true here")
    if config.model_type == "qwen2_moe" and config.tie_word_embeddings:
        raise Unfit("llama.cpp reads no qwen2moe whose head is its embedding; --to hf writes it")
    if isinstance(config, GroupedShape) and config.attention_bias and config.model_type != "llama":
        raise Unfit(f"llama.cpp reads an attention_bias on outputs of no {config.model_type}; --to hf writes it")
    named: dict[str, Value] = {
        key: value for key, name in KEYS[type(config)].items() if (value := getattr(config, name)) is not None
    }
    named["vocab_size"] = config.vocab_size
    if isinstance(config, LatentConfig):
        named |= {
            # Attention happens in the latent's space, where one key, and one value in it, serve all heads.
            "attention.head_count_kv": 1,
            "attention.key_length": config.cache_width,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": config.qk_head_dim,
            "expert_gating_func": SIGMOID if config.has_bias else SOFTMAX,
        }
        own: dict[str, Value] = {}
        if config.q_lora_rank is None and not takes_plain_queries(config.num_hidden_layers):
            named["attention.q_lora_rank"] = config.hidden_size
            own["plain_queries"] = True
        if config.q_lora_rank is not None and takes_plain_queries(config.num_hidden_layers):
            raise Unfit("llama.cpp reads latent models of 26 and 27 layers without a q_lora_rank alone")
    else:
        if config.model_type in QWEN2 and config.num_attention_heads * config.head_dim != config.hidden_size:
            raise Unfit(
                f"llama.cpp reads a {config.model_type} alone whose hidden_size is num_attention_heads x head_dim"
            )
        named |= {"attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim}
        own = {}
    if config.rope_scaling is not None:
        own |= config.rope_scaling.model_dump(exclude_none=True)
    if isinstance(config.rope_scaling, YarnScaling):
        named |= yarn_keys(config.rope_scaling, isinstance(config, LatentConfig))
    if isinstance(config.rope_scaling, LinearScaling):
        named |= {f"{SCALING}type": "linear", f"{SCALING}factor": config.rope_scaling.factor}
    own["initializer_range"] = config.initializer_range
    prefix = architecture(config)
    return {f"{prefix}.{key}": value for key, value in named.items()} | {f"{OWN}{key}": own[key] for key in own}


def yarn_keys(scaling: YarnScaling, latent: bool) -> dict[str, Value]:
    """Returns the keys for YaRN. Raises :class:`Unfit` where llama.cpp would rotate otherwise.

    llama.cpp multiplies rotations by 1 + 0.1 ln(factor), and a latent model's by nothing: there it multiplies scores.
    """
    if latent and not (scaling.mscale_all_dim and math.isclose(scaling.rotation_scale, 1.0)):
        raise Unfit(
            "llama.cpp reads YaRN of a latent model alone whose mscale and mscale_all_dim are one number above 0, "
            "without an attention_factor"
        )
    if not latent and not math.isclose(scaling.rotation_scale, 1.0 + 0.1 * math.log(scaling.factor)):
        raise Unfit("llama.cpp scales YaRN's rotations by 1 + 0.1 ln(factor), and rope_scaling says something else")
    if (scaling.beta_fast, scaling.beta_slow) != BETAS:
        raise Unfit("llama.cpp takes YaRN's beta_fast as {:g} and beta_slow as {:g}".format(*BETAS))
    found: dict[str, Value] = {
        f"{SCALING}type": "yarn",
        f"{SCALING}factor": scaling.factor,
        f"{SCALING}original_context_length": scaling.original_max_position_embeddings,
    }
    return found | ({f"{SCALING}{MULTIPLIER}": 0.1 * (scaling.mscale_all_dim or 0.0)} if latent else {})


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
    if len(further) > len(FURTHER_ENDS):
        further.sort(key=lambda end: tokens[end] in _NAMED_ENDS)
    told = further[: len(FURTHER_ENDS)]
    eom = next((end for end in told if tokens[end] == _EOM), None)
    others = [end for end in told if end != eom]
    return Ends(
        eot=others[0] if others else None,
        eom=others[1] if len(others) > 1 else eom,
        untold=[end for end in further[len(told) :] if tokens[end] not in _NAMED_ENDS],
    )
