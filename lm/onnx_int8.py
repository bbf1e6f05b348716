"""The INT8 graph of a model, written node by node: what :mod:`lm.fake_quant` learned is what onnxruntime computes.

Not made with ``quantize_dynamic``: that scales activations a tensor, so that a token's result would depend on its
batch and what quantization-aware training learned would be lost.

Inputs: ``input_ids`` [batch, length] and for each layer ``past_I`` [batch, past, kv_lora_rank + qk_rope_head_dim], the
normalized latent and the rotated key of the tokens before (a past of 0 tokens is fine). Outputs: ``logits`` [batch,
length, vocabulary] and ``present_I``, the past with the new tokens appended.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lm.attention import LatentAttention
from lm.fake_quant import SMALLEST_SCALE, quantize_weight
from lm.feed_forward import Experts, MixtureOfExperts, Router, SwiGLU
from lm.graph import FLOAT, INT32, INT64, UINT8, Graph
from lm.model import Block, LanguageModel
from lm.norm import RMSNorm


@dataclass(frozen=True)
class Tokens:
    """Quantized activations: ``values`` uint8 [N, K], ``scale`` fp32 [N], ``zero`` uint8 [N]."""

    values: str
    scale: str
    zero: str


def export(model: LanguageModel, path: Path) -> None:
    """Writes the INT8 graph of ``model`` to ``path`` and its weights beside it; equal models give equal bytes."""
    config = model.config
    graph = Graph("overnight-int8")
    width = config.kv_lora_rank + config.qk_rope_head_dim
    ids = graph.input("input_ids", INT64, ["batch", "length"])
    pasts = [graph.input(f"past_{index}", FLOAT, ["batch", "past", width]) for index in range(config.num_hidden_layers)]
    cos, sin = _rotations(graph, model, ids, pasts[0])
    x = _embed(graph, model, ids)
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, Block)
        with graph.scope(f"layer_{index}"):
            x, present = _block(graph, f"model.layers.{index}", layer, x, pasts[index], cos, sin)
        graph.output(present, f"present_{index}", FLOAT, ["batch", "total", width])
    with graph.scope("head"):
        x = _norm(graph, "model.norm", model.model.norm, x)
        logits = linear(graph, "lm_head", model.lm_head.weight, quantize_tokens(graph, _rows(graph, x)))
        logits = _like(graph, logits, ids, config.vocab_size)
    graph.output(logits, "logits", FLOAT, ["batch", "length", config.vocab_size])
    graph.save(path)


def quantize_tokens(graph: Graph, x: str) -> Tokens:
    """Quantizes ``x`` [N, K] a row. Twin of ``fake_quant.fake_quant_tokens``."""
    zero = graph.number(0.0)
    low = graph.op("Min", graph.op("ReduceMin", x, graph.ints(-1), keepdims=0), zero)
    high = graph.op("Max", graph.op("ReduceMax", x, graph.ints(-1), keepdims=0), zero)
    span = graph.op("Div", graph.op("Sub", high, low), graph.number(255.0))
    scale = graph.op("Max", span, graph.number(SMALLEST_SCALE))
    point = graph.op("Cast", graph.op("Round", graph.op("Div", graph.op("Neg", low), scale)), to=UINT8)
    return Tokens(graph.op("QuantizeLinear", x, scale, point, axis=0), scale, point)


def linear(graph: Graph, name: str, weight: torch.Tensor, x: Tokens) -> str:
    """Multiplies ``x`` [N, in] by ``weight`` [out, in] in INT8; returns fp32 [N, out]. Twin of ``fake_quant_linear``.

    The zero points are taken out in exact integers: (x - zero) @ w = x @ w - zero * (column sums of w).
    """
    integers, scales = quantize_weight(weight.detach())
    columns = integers.numpy().T
    product = graph.op("MatMulInteger", x.values, graph.weight(f"{name}.int8", columns))
    sums = graph.weight(f"{name}.sums", columns.sum(axis=0, dtype=np.int32))
    zeros = graph.op("Unsqueeze", graph.op("Cast", x.zero, to=INT32), graph.ints(1))
    exact = graph.op("Sub", product, graph.op("Mul", zeros, sums))
    scaled = graph.op("Mul", graph.op("Cast", exact, to=FLOAT), graph.op("Unsqueeze", x.scale, graph.ints(1)))
    return graph.op("Mul", scaled, graph.weight(f"{name}.scales", _array(scales.squeeze(-1))))


def _embed(graph: Graph, model: LanguageModel, ids: str) -> str:
    integers, scales = quantize_weight(model.model.embed_tokens.weight.detach())
    name = "model.embed_tokens"
    rows = graph.op("Gather", graph.weight(f"{name}.int8", integers.numpy()), ids)
    return graph.op(
        "Mul",
        graph.op("Cast", rows, to=FLOAT),
        graph.op("Gather", graph.weight(f"{name}.scales", _array(scales)), ids),
    )


def _rotations(graph: Graph, model: LanguageModel, ids: str, past: str) -> tuple[str, str]:
    first = graph.op("Squeeze", graph.op("Shape", past, start=1, end=2), graph.ints(0))
    length = graph.op("Squeeze", graph.op("Shape", ids, start=1, end=2), graph.ints(0))
    one = graph.weight("one", np.array(1, dtype=np.int64))
    positions = graph.op("Range", first, graph.op("Add", first, length), one)
    cos, sin = model.model.rotations
    return (
        graph.op("Gather", graph.weight("rotations.cos", _array(cos)), positions),
        graph.op("Gather", graph.weight("rotations.sin", _array(sin)), positions),
    )


def _block(graph: Graph, name: str, block: Block, x: str, past: str, cos: str, sin: str) -> tuple[str, str]:
    normed = _norm(graph, f"{name}.input_layernorm", block.input_layernorm, x)
    attended, present = _attention(graph, f"{name}.self_attn", block.self_attn, normed, past, cos, sin)
    x = graph.op("Add", x, attended)
    rows = _rows(graph, _norm(graph, f"{name}.post_attention_layernorm", block.post_attention_layernorm, x))
    if isinstance(block.mlp, MixtureOfExperts):
        y = _mixture(graph, f"{name}.mlp", block.mlp, rows)
    else:
        assert isinstance(block.mlp, SwiGLU)
        y = _swiglu(graph, f"{name}.mlp", block.mlp, quantize_tokens(graph, rows))
    return graph.op("Add", x, graph.op("Reshape", y, graph.op("Shape", x))), present


def _attention(
    graph: Graph, name: str, attention: LatentAttention, x: str, past: str, cos: str, sin: str
) -> tuple[str, str]:
    config = attention.config
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    x8 = quantize_tokens(graph, _rows(graph, x))
    if config.q_lora_rank is None:
        q = linear(graph, f"{name}.q_proj", attention.q_proj.weight, x8)
    else:
        q = linear(graph, f"{name}.q_a_proj", attention.q_a_proj.weight, x8)
        q = _norm(graph, f"{name}.q_a_layernorm", attention.q_a_layernorm, q)
        q = linear(graph, f"{name}.q_b_proj", attention.q_b_proj.weight, quantize_tokens(graph, q))
    q = graph.op("Transpose", _like(graph, q, x, heads, config.qk_head_dim), perm=[0, 2, 1, 3])
    q_nope, q_rope = graph.ops("Split", q, graph.ints(nope, rope), outputs=2, axis=-1)
    q = graph.op("Concat", q_nope, _rotate(graph, q_rope, cos, sin), axis=-1)

    compressed = linear(graph, f"{name}.kv_a_proj_with_mqa", attention.kv_a_proj_with_mqa.weight, x8)
    compressed = _like(graph, compressed, x, config.kv_lora_rank + rope)
    latent, k_rope = graph.ops("Split", compressed, graph.ints(config.kv_lora_rank, rope), outputs=2, axis=-1)
    latent = _norm(graph, f"{name}.kv_a_layernorm", attention.kv_a_layernorm, latent)
    new = graph.op("Concat", latent, _rotate(graph, k_rope, cos, sin), axis=-1)
    present = graph.op("Concat", past, new, axis=1)

    latents, k_rope = graph.ops("Split", present, graph.ints(config.kv_lora_rank, rope), outputs=2, axis=-1)
    kv = linear(graph, f"{name}.kv_b_proj", attention.kv_b_proj.weight, quantize_tokens(graph, _rows(graph, latents)))
    kv = graph.op("Transpose", _like(graph, kv, present, heads, nope + config.v_head_dim), perm=[0, 2, 1, 3])
    k_nope, v = graph.ops("Split", kv, graph.ints(nope, config.v_head_dim), outputs=2, axis=-1)
    one_key = graph.op("Unsqueeze", k_rope, graph.ints(1))
    k_rope = graph.op("Expand", one_key, graph.ints(1, heads, 1, 1))
    k = graph.op("Concat", k_nope, k_rope, axis=-1)

    scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = graph.op("Mul", scores, graph.number(float(config.qk_head_dim**-0.5)))
    weights = graph.op("Softmax", graph.op("Add", scores, _causal_mask(graph, x, present)), axis=-1)
    out = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    out = graph.op("Reshape", out, graph.ints(-1, heads * config.v_head_dim))
    out = linear(graph, f"{name}.o_proj", attention.o_proj.weight, quantize_tokens(graph, out))
    return _like(graph, out, x, config.hidden_size), present


def _causal_mask(graph: Graph, x: str, present: str) -> str:
    # [length, total]: 0 where the key is not later than the query, else -inf.
    zero, one = graph.weight("zero", np.array(0, np.int64)), graph.weight("one", np.array(1, np.int64))
    length = graph.op("Squeeze", graph.op("Shape", x, start=1, end=2), graph.ints(0))
    total = graph.op("Squeeze", graph.op("Shape", present, start=1, end=2), graph.ints(0))
    keys = graph.op("Range", zero, total, one)
    queries = graph.op("Range", graph.op("Sub", total, length), total, one)
    later = graph.op(
        "Greater", graph.op("Unsqueeze", keys, graph.ints(0)), graph.op("Unsqueeze", queries, graph.ints(1))
    )
    return graph.op("Where", later, graph.number(float("-inf")), graph.number(0.0))


def _rotate(graph: Graph, x: str, cos: str, sin: str) -> str:
    # Twin of `rope.rotate`: pairs (x[2i], x[2i+1]) turned, first members before second ones.
    end = graph.ints(np.iinfo(np.int64).max)
    first = graph.op("Slice", x, graph.ints(0), end, graph.ints(-1), graph.ints(2))
    second = graph.op("Slice", x, graph.ints(1), end, graph.ints(-1), graph.ints(2))
    return graph.op(
        "Concat",
        graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin)),
        graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin)),
        axis=-1,
    )


def _swiglu(graph: Graph, name: str, layer: SwiGLU, x8: Tokens) -> str:
    gate = linear(graph, f"{name}.gate_proj", layer.gate_proj.weight, x8)
    up = linear(graph, f"{name}.up_proj", layer.up_proj.weight, x8)
    return linear(
        graph, f"{name}.down_proj", layer.down_proj.weight, quantize_tokens(graph, _silu_mul(graph, gate, up))
    )


def _silu_mul(graph: Graph, gate: str, up: str) -> str:
    return graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)


def _mixture(graph: Graph, name: str, layer: MixtureOfExperts, x: str) -> str:
    gates = _gates(graph, f"{name}.gate", layer.gate, x)
    x8 = quantize_tokens(graph, x)
    y = _swiglu(graph, f"{name}.shared_experts", layer.shared_experts, x8)
    for index in range(len(layer.experts.gate_up_proj)):
        with graph.scope(f"expert_{index}"):
            y = _add_expert(graph, f"{name}.experts.{index}", layer.experts, index, x8, gates, y)
    return y


def _add_expert(graph: Graph, name: str, experts: Experts, index: int, x8: Tokens, gates: str, y: str) -> str:
    # Only the tokens that chose this expert go through it; with none of them every tensor here has no rows.
    gate = graph.op("Gather", gates, graph.weight(f"index_{index}", np.array(index, np.int64)), axis=1)
    chosen = graph.op("Squeeze", graph.op("NonZero", gate), graph.ints(0))
    mine = Tokens(*(graph.op("Gather", part, chosen) for part in (x8.values, x8.scale, x8.zero)))
    both = linear(graph, f"{name}.gate_up_proj", experts.gate_up_proj[index], mine)
    left, right = graph.ops("Split", both, outputs=2, axis=-1, num_outputs=2)
    hidden = quantize_tokens(graph, _silu_mul(graph, left, right))
    out = linear(graph, f"{name}.down_proj", experts.down_proj[index], hidden)
    weighted = graph.op("Mul", out, graph.op("Unsqueeze", graph.op("Gather", gate, chosen), graph.ints(1)))
    return graph.op("ScatterND", y, graph.op("Unsqueeze", chosen, graph.ints(1)), weighted, reduction="add")


def _gates(graph: Graph, name: str, router: Router, x: str) -> str:
    # [N, E]: the weight of each expert's output for each token, 0 where it was not chosen. Twin of `Router.forward`.
    config = router.config
    scores = graph.op("Sigmoid", graph.op("MatMul", x, graph.weight(f"{name}.weight", _array(router.weight).T)))
    biased = graph.op("Add", scores, graph.weight(f"{name}.bias", _array(router.e_score_correction_bias)))
    if config.topk_group < config.n_group:
        biased = _mask_groups(graph, biased, config.n_group, config.topk_group)
    _, chosen = graph.ops("TopK", biased, graph.ints(config.num_experts_per_tok), outputs=2, axis=-1)
    weights = graph.op("GatherElements", scores, chosen, axis=1)
    if config.norm_topk_prob:
        total = graph.op("ReduceSum", weights, graph.ints(-1), keepdims=1)
        weights = graph.op("Div", weights, graph.op("Add", total, graph.number(1e-20)))
    weights = graph.op("Mul", weights, graph.number(config.routed_scaling_factor))
    nothing = graph.op("Mul", scores, graph.number(0.0))
    return graph.op("ScatterElements", nothing, chosen, weights, axis=1)


def _mask_groups(graph: Graph, biased: str, groups: int, kept: int) -> str:
    grouped = graph.op("Reshape", biased, graph.ints(0, groups, -1))
    best_two, _ = graph.ops("TopK", grouped, graph.ints(2), outputs=2, axis=-1)
    strength = graph.op("ReduceSum", best_two, graph.ints(-1), keepdims=0)
    _, best = graph.ops("TopK", strength, graph.ints(kept), outputs=2, axis=-1)
    minus = graph.op("Expand", graph.number(float("-inf")), graph.op("Shape", strength))
    open_ = graph.op("Expand", graph.number(0.0), graph.op("Shape", best))
    mask = graph.op("ScatterElements", minus, best, open_, axis=1)
    masked = graph.op("Add", grouped, graph.op("Unsqueeze", mask, graph.ints(2)))
    return graph.op("Reshape", masked, graph.op("Shape", biased))


def _norm(graph: Graph, name: str, norm: RMSNorm, x: str) -> str:
    square = graph.op("ReduceMean", graph.op("Mul", x, x), graph.ints(-1), keepdims=1)
    rms = graph.op("Sqrt", graph.op("Add", square, graph.number(float(norm.eps or 0.0))))
    return graph.op("Mul", graph.op("Div", x, rms), graph.weight(f"{name}.weight", _array(norm.weight)))


def _rows(graph: Graph, x: str) -> str:
    """[batch, length, K] to [batch * length, K]."""
    return graph.op("Flatten", x, axis=2)


def _like(graph: Graph, rows: str, x: str, *inner: int) -> str:
    """[batch * length, ...] to [batch, length, *inner], batch and length those of ``x``."""
    shape = graph.op("Concat", graph.op("Shape", x, start=0, end=2), graph.ints(*inner), axis=0)
    return graph.op("Reshape", rows, shape)


def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.detach().float().numpy()
    return array
