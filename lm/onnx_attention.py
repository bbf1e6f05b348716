"""Attention in the graph: twins of :mod:`lm.latent` and :mod:`lm.grouped`, each with its cache.

``past`` holds what a layer keeps of the tokens before; the result has that of the new ones appended. Shape suffixes as
in those modules, and P tokens before.
"""

import numpy as np

from lm.grouped import GroupedAttention
from lm.latent import LatentAttention
from lm.planned_graph import PlannedGraph
from lm.scheme import Rows


def latent(
    graph: PlannedGraph, name: str, attention: LatentAttention, x: str, past: str, cos: str, sin: str
) -> tuple[str, str]:
    """Returns the output [B, T, D] and the cache [B, P + T, C + R] with the new tokens in it.

    Keys and values are never expanded: queries are brought into the latent's space, and what is read from there back
    out of it (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, "absorbed"). So a new token costs P (C + R) products a
    head, and not the expansion of P tokens. That is the product of `kv_b_proj` in another order, so its operands are
    rounded as that product rounds them; the cache holds rounded latents.
    """
    config = attention.config
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    rank, width = config.kv_lora_rank, config.cache_width
    rows = graph.rows(x)
    if config.q_lora_rank is None:
        q = graph.linear(f"{name}.q_proj", attention.q_proj, rows)
    else:
        q = graph.linear(f"{name}.q_a_proj", attention.q_a_proj, rows)
        q = graph.norm(f"{name}.q_a_layernorm", attention.q_a_layernorm, q)
        q = graph.linear(f"{name}.q_b_proj", attention.q_b_proj, Rows(graph, q))
    q = graph.op("Transpose", graph.like(q, x, heads, config.qk_head_dim), perm=[0, 2, 1, 3])
    q_nope, q_rope = graph.ops("Split", q, graph.ints(nope, rope), outputs=2, axis=-1)

    compressed = graph.linear(f"{name}.kv_a_proj_with_mqa", attention.kv_a_proj_with_mqa, rows)
    new, k_rope = graph.ops("Split", graph.like(compressed, x, width), graph.ints(rank, rope), outputs=2, axis=-1)
    new = graph.rounded(f"{name}.kv_b_proj", graph.norm(f"{name}.kv_a_layernorm", attention.kv_a_layernorm, new))
    new = graph.op("Concat", new, _rotate(graph, k_rope, cos, sin), axis=-1)
    present = graph.op("Concat", past, new, axis=1)

    weight = graph.constant(f"{name}.kv_b_proj", attention.kv_b_proj)
    by_head = graph.op("Reshape", weight, graph.ints(heads, nope + config.v_head_dim, rank))
    to_keys, to_values = graph.ops("Split", by_head, graph.ints(nope, config.v_head_dim), outputs=2, axis=1)
    q = graph.op("Concat", graph.op("MatMul", q_nope, to_keys), _rotate(graph, q_rope, cos, sin), axis=-1)
    # The heads lie side by side as more queries to the one cache.
    batch, total = graph.op("Shape", x, start=0, end=1), graph.op("Shape", present, start=1, end=2)
    q = graph.op("Reshape", q, graph.op("Concat", batch, graph.ints(-1, width), axis=0))
    scores = graph.op("MatMul", q, graph.op("Transpose", present, perm=[0, 2, 1]))
    scores = graph.op("Reshape", scores, graph.op("Concat", batch, graph.ints(heads, -1), total, axis=0))
    weights = _softmax(graph, scores, config.qk_head_dim, x, present)
    weights = graph.op("Reshape", weights, graph.op("Concat", batch, graph.ints(-1), total, axis=0))
    read = graph.op("MatMul", weights, present)
    read = graph.op("Slice", read, graph.ints(0), graph.ints(rank), graph.ints(-1))
    read = graph.op("Reshape", read, graph.op("Concat", batch, graph.ints(heads, -1, rank), axis=0))
    out = graph.op("MatMul", read, graph.op("Transpose", to_values, perm=[0, 2, 1]))
    out = graph.op("Transpose", out, perm=[0, 2, 1, 3])
    out = graph.op("Reshape", out, graph.ints(-1, heads * config.v_head_dim))
    y = graph.linear(f"{name}.o_proj", attention.o_proj, Rows(graph, out))
    return graph.like(y, x, config.hidden_size), present


def grouped(
    graph: PlannedGraph, name: str, attention: GroupedAttention, x: str, past: str, cos: str, sin: str
) -> tuple[str, str]:
    """Returns the output [B, T, D] and the cache [B, P + T, 2 G W], rotated keys before values."""
    config = attention.config
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows = graph.rows(x)
    q = graph.like(graph.linear(f"{name}.q_proj", attention.q_proj, rows), x, heads, width)
    k = graph.like(graph.linear(f"{name}.k_proj", attention.k_proj, rows), x, groups, width)
    v = graph.like(graph.linear(f"{name}.v_proj", attention.v_proj, rows), x, groups * width)
    if config.norms_heads:
        q = graph.norm(f"{name}.q_norm", attention.q_norm, q)
        k = graph.norm(f"{name}.k_norm", attention.k_norm, k)
    q = _rotate_halves(graph, graph.op("Transpose", q, perm=[0, 2, 1, 3]), cos, sin)
    k = _rotate_halves(graph, graph.op("Transpose", k, perm=[0, 2, 1, 3]), cos, sin)
    k = graph.like(graph.op("Transpose", k, perm=[0, 2, 1, 3]), x, groups * width)
    present = graph.op("Concat", past, graph.op("Concat", k, v, axis=-1), axis=1)

    keys, values = graph.ops("Split", present, graph.ints(groups * width, groups * width), outputs=2, axis=-1)
    # The heads of a group lie side by side as more queries to one head of keys.
    batch = graph.op("Shape", x, start=0, end=1)
    q = graph.op("Reshape", q, graph.op("Concat", batch, graph.ints(groups, -1, width), axis=0))
    keys = graph.op("Transpose", graph.like(keys, present, groups, width), perm=[0, 2, 3, 1])
    values = graph.op("Transpose", graph.like(values, present, groups, width), perm=[0, 2, 1, 3])
    total = graph.op("Shape", present, start=1, end=2)
    scores = graph.op("MatMul", q, keys)
    scores = graph.op("Reshape", scores, graph.op("Concat", batch, graph.ints(heads, -1), total, axis=0))
    weights = _softmax(graph, scores, width, x, present)
    weights = graph.op("Reshape", weights, graph.op("Concat", batch, graph.ints(groups, -1), total, axis=0))
    out = graph.op("MatMul", weights, values)
    out = graph.op("Reshape", out, graph.op("Concat", batch, graph.ints(heads, -1, width), axis=0))
    out = graph.op("Reshape", graph.op("Transpose", out, perm=[0, 2, 1, 3]), graph.ints(-1, heads * width))
    return graph.like(
        graph.linear(f"{name}.o_proj", attention.o_proj, Rows(graph, out)), x, config.hidden_size
    ), present


def _softmax(graph: PlannedGraph, scores: str, width: int, x: str, present: str) -> str:
    scaled = graph.op("Mul", scores, graph.number(float(width**-0.5)))
    return graph.op("Softmax", graph.op("Add", scaled, _causal_mask(graph, x, present)), axis=-1)


def _causal_mask(graph: PlannedGraph, x: str, present: str) -> str:
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


def _rotate(graph: PlannedGraph, x: str, cos: str, sin: str) -> str:
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


def _rotate_halves(graph: PlannedGraph, x: str, cos: str, sin: str) -> str:
    # Twin of `rope.rotate_halves`.
    first, second = graph.ops("Split", x, outputs=2, axis=-1, num_outputs=2)
    return graph.op(
        "Concat",
        graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin)),
        graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin)),
        axis=-1,
    )
