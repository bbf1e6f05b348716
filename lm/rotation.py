"""Turns the spaces between a model's layers: the model computes what it did, and no channel stands out any more.

A few channels of a trained model are many times larger than the others, and what shares a scale with them is rounded
coarsely. An RMS norm without a weight does not see an orthogonal turn of its input, so what writes into a space can be
turned, and what reads from it turned with it (QuaRot, arXiv 2404.00456, section 4): the large channels are spread over
all. Turned are the residual stream, the values of each head, and the latents; norms' weights go into what reads them.

What ``down_proj`` reads comes from a product of two numbers, which no turn passes: :func:`turn_hidden` has it turned
while the model runs (the paper's online transform).
"""

import math

import torch
from torch import nn

from lm.config import LatentConfig
from lm.feed_forward import Experts, MixtureOfExperts, SwiGLU
from lm.grouped import GroupedAttention
from lm.latent import LatentAttention
from lm.model import Block, LanguageModel
from lm.norm import RMSNorm
from lm.quantization import Plan, layers, products

# A matrix, or a stack of them: what a space is read by, or written by, through its last axis or its last but one.
Matrices = list[torch.Tensor]

# The widest turn while the model runs. Wider ones spread more, and take more time: a token's width times this.
_WIDEST = 128
# A narrower one spreads too little to be worth a product.
_NARROWEST = 8


@torch.no_grad()
def rotate(model: LanguageModel) -> LanguageModel:
    """Turns ``model`` in place, up to rounding in fp32 the same function, its norms' weights 1. Returns it.

    A head that was tied to the embedding is not any more: only what the head reads had a norm with a weight.
    """
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    stream = orthogonal(model.config.hidden_size)
    _turn_reads([model.model.embed_tokens.weight], stream)
    for block in model.model.layers:
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        _read_normed(block.input_layernorm, _first_of(attention), stream)
        _read_normed(block.post_attention_layernorm, _inputs_of(mlp), stream)
        writers = [attention.o_proj, *([mlp.down_proj] if isinstance(mlp, SwiGLU) else [])]
        _turn_writes([attention.o_proj.weight, *_outputs_of(mlp)], stream)
        _turn_reads([layer.bias for layer in writers if layer.bias is not None], stream)
        if isinstance(attention, LatentAttention):
            _turn_latents(attention)
        else:
            _turn_values(attention)
    _read_normed(model.model.norm, [model.lm_head.weight], stream)
    return model


@torch.no_grad()
def turn_hidden(model: LanguageModel, plan: Plan) -> LanguageModel:
    """Has what each ``down_proj`` reads turned while ``model`` runs, and its weight with it, in place. Returns it.

    Not where ``plan`` keeps it float, nor experts whose scales are of blocks: as a rule they are one operator, which
    turns nothing. The turn is as wide as the largest divisor of the inputs up to 128; with none from 8 on a layer stays
    as it is.
    """
    for name, layer in layers(model).items():
        product = products(name, layer)[-1]
        levels = plan.of(name, product).levels
        if not product.endswith(".down_proj") or levels is None:
            continue
        if isinstance(layer, Experts) and levels.group is not None:
            continue
        weight = layer.down_proj if isinstance(layer, Experts) else layer.weight
        width = _width(weight.shape[-1])
        if width >= _NARROWEST:
            turn = orthogonal(width)
            _turn_reads([weight.unflatten(-1, (-1, width))], turn)
            layer.turn = turn.to(weight)
    return model


def _width(size: int) -> int:
    return next(width for width in range(min(size, _WIDEST), 0, -1) if size % width == 0)


def orthogonal(size: int) -> torch.Tensor:
    """Returns an orthogonal matrix [size, size] in fp64 without a large entry: a cosine transform of random signs.

    Any size has one, not only powers of 2 as with Hadamard's; a closed form, so that every machine turns alike.
    """
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (places[None] + 0.5) * places[:, None]) * math.sqrt(2 / size)
    matrix[0] *= math.sqrt(0.5)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)) * 2.0 - 1
    return (matrix * signs).T


def _first_of(attention: LatentAttention | GroupedAttention) -> Matrices:
    if isinstance(attention, GroupedAttention):
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    elif attention.config.q_lora_rank is None:
        layers = [attention.q_proj, attention.kv_a_proj_with_mqa]
    else:
        layers = [attention.q_a_proj, attention.kv_a_proj_with_mqa]
    return [layer.weight for layer in layers]


def _inputs_of(mlp: SwiGLU | MixtureOfExperts) -> Matrices:
    if isinstance(mlp, SwiGLU):
        return [mlp.gate_proj.weight, mlp.up_proj.weight]
    gates = [mlp.gate.weight] if mlp.shared_expert_gate is None else [mlp.gate.weight, mlp.shared_expert_gate.weight]
    return [*gates, mlp.experts.gate_up_proj, *(matrix for one in _shared(mlp) for matrix in _inputs_of(one))]


def _outputs_of(mlp: SwiGLU | MixtureOfExperts) -> Matrices:
    if isinstance(mlp, SwiGLU):
        return [mlp.down_proj.weight]
    return [mlp.experts.down_proj, *(matrix for one in _shared(mlp) for matrix in _outputs_of(one))]


def _shared(mlp: MixtureOfExperts) -> list[SwiGLU]:
    return [one for one in (mlp.shared_experts, mlp.shared_expert) if one is not None]


def _turn_latents(attention: LatentAttention) -> None:
    config = attention.config
    assert isinstance(config, LatentConfig)
    latent = orthogonal(config.kv_lora_rank)
    # Views: the latent's rows of a matrix that also makes the rotary key, and the values' rows of each head.
    _turn_writes([attention.kv_a_proj_with_mqa.weight[: config.kv_lora_rank]], latent)
    _read_normed(attention.kv_a_layernorm, [attention.kv_b_proj.weight], latent)
    if config.q_lora_rank is not None:
        queries = orthogonal(config.q_lora_rank)
        _turn_writes([attention.q_a_proj.weight], queries)
        _read_normed(attention.q_a_layernorm, [attention.q_b_proj.weight], queries)
    values = orthogonal(config.v_head_dim)
    heads = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
    _turn_writes([heads[:, config.qk_nope_head_dim :]], values)
    _turn_reads([attention.o_proj.weight.unflatten(1, (config.num_attention_heads, -1))], values)


def _turn_values(attention: GroupedAttention) -> None:
    config = attention.config
    values = orthogonal(config.head_dim)
    heads = attention.v_proj.weight.unflatten(0, (config.num_key_value_heads, -1))
    _turn_writes([heads], values)
    if attention.v_proj.bias is not None:
        _turn_reads([attention.v_proj.bias.unflatten(0, (config.num_key_value_heads, -1))], values)
    _turn_reads([attention.o_proj.weight.unflatten(1, (config.num_attention_heads, -1))], values)


def _read_normed(norm: RMSNorm, readers: Matrices, turn: torch.Tensor) -> None:
    for matrix in readers:
        matrix.copy_(((matrix.double() * norm.weight.double()) @ turn).to(matrix.dtype))
    norm.weight.fill_(1.0)


def _turn_reads(readers: Matrices, turn: torch.Tensor) -> None:
    for matrix in readers:
        matrix.copy_((matrix.double() @ turn).to(matrix.dtype))


def _turn_writes(writers: Matrices, turn: torch.Tensor) -> None:
    for matrix in writers:
        matrix.copy_((turn.T @ matrix.double()).to(matrix.dtype))
