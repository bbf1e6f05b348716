"""Which tensors of llama.cpp's file format GGUF are which of Hugging Face's layout, and how one becomes the other.

Names and forms are those that llama.cpp reads for its architectures llama, qwen2, qwen3, qwen2moe, qwen3moe and
deepseek2 (github.com/ggml-org/llama.cpp, ``src/llama-arch.cpp`` and ``conversion/``). Imports no torch.

Shape suffixes: H heads, W head size, C latent rank, N head size without position, V value head size.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lm.config import (
    GroupedConfig,
    GroupedMixtureConfig,
    GroupedShape,
    LatentConfig,
    Llama3Scaling,
    MixtureConfig,
    ModelConfig,
)

Array = npt.NDArray[np.float32]
Change = Callable[[Sequence[Array]], list[Array]]
EXPANDED = "attn_kv_b"
# They are there where all of attention, and of the feed-forward, has biases.
OUTPUT_BIAS, MLP_BIAS = "blk.0.attn_output.bias", "blk.0.ffn_down.bias"


class Unfit(ValueError):
    """A file and the formats do not fit each other. The message is one line that names what is at fault."""


@dataclass(frozen=True)
class Part:
    """Tensors of the layout that together are tensors of GGUF; most often one is one, and the same."""

    names: tuple[str, ...]
    sources: tuple[str, ...]
    to_gguf: Change = list
    to_layout: Change = list
    # Those of `names` that stay fp32 where other matrices become smaller.
    in_float: tuple[str, ...] = ()


def parts(config: ModelConfig, expanded: bool = False) -> list[Part]:
    """Returns all tensors of a model of the shape ``config``, in the order in which they are written.

    ``expanded`` is for latent models as llama.cpp's converter wrote them until April 2025: what expands latents to keys
    and values is one tensor, ``EXPANDED``, as in Hugging Face's layout.
    """
    found = [Part(("token_embd.weight",), ("model.embed_tokens.weight",))]
    if isinstance(config, GroupedShape) and isinstance(config.rope_scaling, Llama3Scaling):
        factors = rope_factors(config.head_dim, config.rope_theta, config.rope_scaling)
        found.append(Part(("rope_freqs.weight",), (), lambda _: [factors], lambda _: []))
    for layer in range(config.num_hidden_layers):
        found += _layer(config, layer, expanded)
    found.append(Part(("output_norm.weight",), ("model.norm.weight",)))
    if not config.tie_word_embeddings:
        found.append(Part(("output.weight",), ("lm_head.weight",)))
    return found


def check_names(expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises :class:`Unfit` that names the tensors that are missing in ``found``, or those that nothing reads."""
    wanted, there = set(expected), set(found)
    for kind, names in (("lacks", wanted - there), ("has, beyond what its configuration says,", there - wanted)):
        if names:
            shown = sorted(names, key=_in_order)
            more = f" and {len(shown) - _MOST_NAMED} more" if len(shown) > _MOST_NAMED else ""
            raise Unfit(f"it {kind} {', '.join(shown[:_MOST_NAMED])}{more}")


def rope_factors(head_dim: int, theta: float, scaling: Llama3Scaling) -> Array:
    """Returns by what each of the head_dim / 2 rotations is slowed down: what :mod:`lm.rope` does, as divisors."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clip(0, 1)
    return (1 / ((1 - share) / scaling.factor + share)).astype(np.float32)


_MOST_NAMED = 3


def _layer(config: ModelConfig, layer: int, expanded: bool) -> list[Part]:
    attention = _latent(config, expanded) if isinstance(config, LatentConfig) else _grouped(config)
    if isinstance(config, GroupedMixtureConfig) or (
        isinstance(config, LatentConfig) and layer >= config.first_k_dense_replace
    ):
        feed_forward = _experts(config)
    else:
        feed_forward = [
            Part((f"ffn_{name}.{kind}",), (f"mlp.{name}_proj.{kind}",))
            for name in ("gate", "up", "down")
            for kind in _kinds(isinstance(config, GroupedConfig) and config.mlp_bias)
        ]
    return [
        replace(
            part,
            names=tuple(f"blk.{layer}.{name}" for name in part.names),
            sources=tuple(f"model.layers.{layer}.{source}" for source in part.sources),
            in_float=tuple(f"blk.{layer}.{name}" for name in part.in_float),
        )
        for part in [*attention, _weight("ffn_norm", "post_attention_layernorm"), *feed_forward]
    ]


def _grouped(config: GroupedShape) -> list[Part]:
    found = [_NORM]
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads), ("v", 0)):
        for kind in _kinds(config.has_biases):
            part = Part((f"attn_{name}.{kind}",), (f"self_attn.{name}_proj.{kind}",))
            if config.model_type == "llama" and heads:
                # llama.cpp turns neighbours in this architecture, and the two halves of a head in the others.
                part = Part(part.names, part.sources, _interleaved(heads), _halved(heads))
            found.append(part)
    found += [Part((f"attn_output.{kind}",), (f"self_attn.o_proj.{kind}",)) for kind in _kinds(config.attention_bias)]
    if config.norms_heads:
        found += [_weight(f"attn_{name}_norm", f"self_attn.{name}_norm") for name in ("q", "k")]
    return found


def _latent(config: LatentConfig, expanded: bool) -> list[Part]:
    if config.q_lora_rank is not None:
        queries = [
            _NORM,
            _weight("attn_q_a", "self_attn.q_a_proj"),
            _weight("attn_q_a_norm", "self_attn.q_a_layernorm"),
            _weight("attn_q_b", "self_attn.q_b_proj"),
        ]
    elif takes_plain_queries(config.num_hidden_layers):
        queries = [_NORM, _weight("attn_q", "self_attn.q_proj")]
    else:
        queries = [_disguised_queries()]
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim

    def split(tensors: Sequence[Array]) -> list[Array]:
        expanded_HXC = tensors[0].reshape(heads, -1, config.kv_lora_rank)
        # llama.cpp takes queries into the latent's space, so it wants what expands keys transposed: [H, C, N].
        return [expanded_HXC[:, :nope].swapaxes(1, 2), expanded_HXC[:, nope:]]

    def joined(tensors: Sequence[Array]) -> list[Array]:
        keys_HCN, values_HVC = tensors
        return [np.concatenate([keys_HCN.swapaxes(1, 2), values_HVC], axis=1).reshape(-1, config.kv_lora_rank)]

    return [
        *queries,
        _weight("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
        _weight("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
        _weight(EXPANDED, "self_attn.kv_b_proj")
        if expanded
        else Part(("attn_k_b.weight", "attn_v_b.weight"), ("self_attn.kv_b_proj.weight",), split, joined),
        _weight("attn_output", "self_attn.o_proj"),
    ]


def takes_plain_queries(layers: int) -> bool:
    """Says whether llama.cpp reads a latent model of this depth without compressed queries.

    It tells DeepSeek-V2-Lite and its kin by their 26 or 27 layers, and wants ``attn_q_a`` of all others.
    """
    return layers in (26, 27)


def _disguised_queries() -> Part:
    """Plain queries as compressed ones of full rank: q_proj(x) is q_b(q_a_norm(q_a(x))) where q_a undoes the norm.

    The norm of attention made x = w * h / rms(h). Divided by w, x has the root mean square 1, so that a second norm
    with the weights w gives x again (but for eps: where h has the mean square m, it makes x larger by eps / 2m).
    """

    def to_gguf(tensors: Sequence[Array]) -> list[Array]:
        norm, queries = tensors
        if not norm.all():
            raise Unfit("a norm's weight is 0, and llama.cpp takes queries without a q_lora_rank from no such model")
        return [norm, np.diag(1 / norm), norm, queries]

    return Part(
        names=("attn_norm.weight", "attn_q_a.weight", "attn_q_a_norm.weight", "attn_q_b.weight"),
        sources=("input_layernorm.weight", "self_attn.q_proj.weight"),
        to_gguf=to_gguf,
        to_layout=lambda tensors: [tensors[0], tensors[3]],
        in_float=("attn_q_a.weight",),
    )


def _experts(config: MixtureConfig) -> list[Part]:
    routed = [
        Part(
            (f"ffn_{name}_exps.weight",),
            tuple(f"mlp.experts.{expert}.{name}_proj.weight" for expert in range(config.n_routed_experts)),
            lambda tensors: [np.stack(tensors)],
            lambda tensors: list(tensors[0]),
        )
        for name in ("gate", "up", "down")
    ]
    found = [Part(("ffn_gate_inp.weight",), ("mlp.gate.weight",), in_float=("ffn_gate_inp.weight",))]
    if config.has_bias:
        found.append(Part(("exp_probs_b.bias",), ("mlp.gate.e_score_correction_bias",)))
    found += routed
    if config.shared_size:
        shared = "shared_experts" if isinstance(config, LatentConfig) else "shared_expert"
        found += [_weight(f"ffn_{name}_shexp", f"mlp.{shared}.{name}_proj") for name in ("gate", "up", "down")]
    if config.model_type == "qwen2_moe":
        # A vector there, and here a matrix of one row.
        vector, matrix = "ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight"
        found.append(
            Part((vector,), (matrix,), lambda tensors: [tensors[0][0]], lambda tensors: [tensors[0].reshape(1, -1)])
        )
    return found


def _kinds(has_bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if has_bias else ("weight",)


def _weight(name: str, source: str) -> Part:
    return Part((f"{name}.weight",), (f"{source}.weight",))


_NORM = _weight("attn_norm", "input_layernorm")


def _interleaved(heads: int) -> Change:
    """Rows of each head from (all first members, all second ones) to pairs side by side."""
    return lambda tensors: [
        tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape) for tensor in tensors
    ]


def _halved(heads: int) -> Change:
    """What :func:`_interleaved` did, undone."""
    return lambda tensors: [
        tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape) for tensor in tensors
    ]


def _in_order(name: str) -> list[tuple[int, str]]:
    # blk.2 before blk.10.
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in name.split(".")]
