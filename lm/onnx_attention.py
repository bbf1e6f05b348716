"""Attention in the graph: twins of :mod:`lm.latent` and :mod:`lm.grouped`, each with its caches.

A cache has room for ``capacity`` tokens; those of a call are written at their positions, and a token attends to what
stands at its own position and before. Shape suffixes as in those modules, and S for the capacity.
"""

import numpy as np
import torch
from torch.nn.functional import pad

from lm.config import GroupedShape, LatentConfig
from lm.graph import INT32
from lm.grouped import GroupedAttention
from lm.latent import LatentAttention
from lm.packing import siblings
from lm.planned_graph import PlannedGraph, array
from lm.scheme import Rows


class LatentPlaces:
    """What all layers with latent attention read of the tokens' positions [B, T]."""

    def __init__(self, graph: PlannedGraph, positions: str, rotations: torch.Tensor, config: LatentConfig) -> None:
        self.rotations = [
            graph.weight(f"rotations.{name}", array(table))
            for name, table in zip(("cos", "sin"), rotations, strict=True)
        ]
        self.positions = positions
        flat = graph.op("Reshape", positions, graph.ints(-1))
        zero, one = graph.weight("zero", np.array(0, np.int64)), graph.weight("one", np.array(1, np.int64))
        batch = graph.op("Squeeze", graph.op("Shape", positions, start=0, end=1), graph.ints(0))
        rows = graph.op("Unsqueeze", graph.op("Range", zero, batch, one), graph.ints(1))
        rows = graph.op("Reshape", graph.op("Expand", rows, graph.op("Shape", positions)), graph.ints(-1, 1))
        # [N, 2]: the row and the place of each token in a cache.
        self.in_cache = graph.op("Concat", rows, graph.op("Unsqueeze", flat, graph.ints(1)), axis=1)
        self.capacity = graph.op("Shape", "past_0", start=1, end=2)
        self.expand = self._expansion_pays(graph, config)
        keys = graph.op("Range", zero, graph.op("Squeeze", self.capacity, graph.ints(0)), one)
        seen = graph.op("LessOrEqual", keys, graph.op("Unsqueeze", positions, graph.ints(1, 3)))
        # [B, 1, T, S]: 0 where the key is not later than the query, else -inf.
        self.mask = graph.op("Where", seen, graph.number(0.0), graph.number(float("-inf")))

    def _expansion_pays(self, graph: PlannedGraph, config: LatentConfig) -> str | None:
        """Whether keys and values are better expanded, [1]: it saves T S pairs' products, and costs S - T tokens'."""
        saved = _products_saved(config)
        if saved <= 0:
            return None
        length = graph.op("Shape", self.positions, start=1, end=2)
        pairs = graph.op("Mul", graph.op("Mul", length, self.capacity), graph.ints(saved))
        cost = graph.ints(config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim))
        more = graph.op("Mul", graph.op("Sub", self.capacity, length), cost)
        return graph.op("GreaterOrEqual", pairs, more)


def _products_saved(config: LatentConfig) -> int:
    """Returns how many products expanded keys and values save a head, a new token and a token in the cache.

    A pair of tokens takes P + R + V of them, P being the width of keys without positions, and absorbed 2 C + R.
    """
    return 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim


def _queries_and_latents(
    graph: PlannedGraph, name: str, attention: LatentAttention, x: str, places: LatentPlaces
) -> tuple[str, str, str]:
    """Returns the queries' parts without position [B, H, T, P] and with, the latter not rotated yet [B, H, T, R].

    And what the cache gets for the new tokens: the rounded latents, and behind each its rotary key [N, C + R].
    """
    config = attention.config
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    layers = siblings(attention)
    widths = graph.ints(len(next(iter(layers.values())).weight), config.kv_lora_rank, rope)
    q, new, k_rope = graph.ops("Split", graph.packed(name, layers, Rows(graph, x)), widths, outputs=3, axis=-1)
    if config.q_lora_rank is not None:
        q = graph.norm(f"{name}.q_a_layernorm", attention.q_a_layernorm, q)
        q = graph.linear(f"{name}.q_b_proj", attention.q_b_proj, Rows(graph, q))
    q = graph.op("Transpose", graph.unflat(q, places.positions, heads, config.qk_head_dim), perm=[0, 2, 1, 3])
    q_nope, q_rope = graph.ops("Split", q, graph.ints(nope, rope), outputs=2, axis=-1)

    new = graph.norm(f"{name}.kv_a_layernorm", attention.kv_a_layernorm, new)
    new = graph.rounded(f"{name}.kv_b_proj", new, config.kv_lora_rank)
    k_rope = graph.unflat(k_rope, places.positions, rope)
    k_rope = graph.op("Reshape", _rotate(graph, k_rope, places, num_heads=1), graph.ints(-1, rope))
    return q_nope, q_rope, graph.op("Concat", new, k_rope, axis=-1)


def latent(
    graph: PlannedGraph, name: str, attention: LatentAttention, x: str, pasts: list[str], places: LatentPlaces
) -> tuple[str, list[str]]:
    """Returns the output [N, D] and the cache [B, S, C + R] with the new tokens in it; ``x`` [N, D].

    For few new tokens, keys and values are not expanded: queries are brought into the latent's space, and what is read
    from there back out of it (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, "absorbed"). So a new token costs S (2 C +
    R) products a head, and not the expansion of S tokens. For many, as in a prompt, that costs less than the wider
    products. Both are the product of `kv_b_proj` in one order or the other, so its operands are rounded as that product
    rounds them; the cache holds rounded latents.
    """
    config = attention.config
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    rank, width = config.kv_lora_rank, config.cache_width
    q_nope, q_rope, new = _queries_and_latents(graph, name, attention, x, places)
    present = graph.op("ScatterND", *pasts, places.in_cache, new)

    weight = graph.constant(f"{name}.kv_b_proj", attention.kv_b_proj)
    by_head = graph.op("Reshape", weight, graph.ints(heads, nope + config.v_head_dim, rank))
    to_keys, to_values = graph.ops("Split", by_head, graph.ints(nope, config.v_head_dim), outputs=2, axis=1)
    q_rope = _rotate(graph, q_rope, places)

    def weights(scores: str) -> str:
        scaled = graph.op("Mul", scores, graph.number(float(config.score_scale)))
        return graph.op("Softmax", graph.op("Add", scaled, places.mask), axis=-1)

    def absorbed() -> str:
        q = graph.op("Concat", graph.op("MatMul", q_nope, to_keys), q_rope, axis=-1)
        # The heads lie side by side as more queries to the one cache.
        q = graph.op("Reshape", q, graph.ints(0, -1, width))
        scores = graph.op("MatMul", q, graph.op("Transpose", present, perm=[0, 2, 1]))
        by_head = graph.op("Concat", graph.ints(0, heads, -1), places.capacity, axis=0)
        side_by_side = graph.op("Concat", graph.ints(0, -1), places.capacity, axis=0)
        found = graph.op("Reshape", weights(graph.op("Reshape", scores, by_head)), side_by_side)
        read = graph.op("Slice", graph.op("MatMul", found, present), graph.ints(0), graph.ints(rank), graph.ints(-1))
        read = graph.op("Reshape", read, graph.ints(0, heads, -1, rank))
        return graph.op("MatMul", read, graph.op("Transpose", to_values, perm=[0, 2, 1]))

    def expanded() -> str:
        latents, k_rope = graph.ops("Split", present, graph.ints(rank, rope), outputs=2, axis=-1)
        latents = graph.op("Unsqueeze", latents, graph.ints(1))
        keys = graph.op("MatMul", latents, graph.op("Transpose", to_keys, perm=[0, 2, 1]))
        k_rope = graph.op("Expand", graph.op("Unsqueeze", k_rope, graph.ints(1)), graph.ints(1, heads, 1, 1))
        keys = graph.op("Concat", keys, k_rope, axis=-1)
        q = graph.op("Concat", q_nope, q_rope, axis=-1)
        scores = graph.op("MatMul", q, graph.op("Transpose", keys, perm=[0, 1, 3, 2]))
        values = graph.op("MatMul", latents, graph.op("Transpose", to_values, perm=[0, 2, 1]))
        return graph.op("MatMul", weights(scores), values)

    out = absorbed() if places.expand is None else graph.either(places.expand, expanded, absorbed)
    out = graph.op("Transpose", out, perm=[0, 2, 1, 3])
    out = graph.op("Reshape", out, graph.ints(-1, heads * config.v_head_dim))
    return graph.linear(f"{name}.o_proj", attention.o_proj, Rows(graph, out)), [present]


class GroupedPlaces:
    """What all layers with grouped-query attention read of the tokens' positions [B, T]."""

    def __init__(self, graph: PlannedGraph, positions: str, rotations: torch.Tensor, config: GroupedShape) -> None:
        cos, sin = pad(rotations, (0, (config.cache_head_dim - config.head_dim) // 2))
        self.positions = positions
        self.cos, self.sin = graph.weight("rotations.cos", array(cos)), graph.weight("rotations.sin", array(sin))
        # [B]: the last position of each row, which the operator calls the length of its keys less one.
        last = graph.op("Gather", positions, graph.weight("minus_one", np.array(-1, np.int64)), axis=1)
        self.last = graph.op("Cast", last, to=INT32)
        longest = graph.op("ReduceMax", self.last, keepdims=0)
        self.total = graph.op("Add", longest, graph.weight("one_int32", np.array(1, np.int32)))


def grouped(
    graph: PlannedGraph, name: str, attention: GroupedAttention, x: str, pasts: list[str], places: GroupedPlaces
) -> tuple[str, list[str]]:
    """Returns the output [N, D] and the caches of rotated keys and of values [B, G, S, W'] with the new tokens.

    By onnxruntime's ``GroupQueryAttention``, which rotates, masks and writes in place. It takes several tokens after a
    past for a single row only, and no heads of any width: both halves of W are filled up with zeros, which add nothing
    to a product, and make W'.
    """
    config = attention.config
    heads, groups, width, wide = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.cache_head_dim
    )  # fmt: skip
    rows = Rows(graph, x)
    packed = graph.packed(name, siblings(attention), rows)
    if config.norms_heads:
        sizes = graph.ints(heads * width, groups * width, groups * width)
        q, k, v = graph.ops("Split", packed, sizes, outputs=3, axis=-1)
        q = graph.norm(f"{name}.q_norm", attention.q_norm, graph.unflat(q, places.positions, heads, width))
        k = graph.norm(f"{name}.k_norm", attention.k_norm, graph.unflat(k, places.positions, groups, width))
        parts = ((q, heads), (k, groups), (v, groups))
        operands = [_filled_up(graph, part, places, count, config) for part, count in parts]
    else:
        # The operator takes the three side by side as well.
        operands = [_filled_up(graph, packed, places, heads + 2 * groups, config), "", ""]
    out, *presents = graph.ops(
        "GroupQueryAttention", *operands, *pasts, places.last, places.total, places.cos, places.sin, outputs=3,
        domain="com.microsoft", num_heads=heads, kv_num_heads=groups, do_rotary=1,
        **({"scale": width**-0.5} if wide > width else {}),
    )  # fmt: skip
    if wide > width:
        out = graph.op("Reshape", out, graph.ints(-1, 2 * heads, wide // 2))
        out = graph.op("Slice", out, graph.ints(0), graph.ints(width // 2), graph.ints(-1))
    out = graph.op("Reshape", out, graph.ints(-1, heads * width))
    return graph.linear(f"{name}.o_proj", attention.o_proj, Rows(graph, out)), presents


def _filled_up(graph: PlannedGraph, x: str, places: GroupedPlaces, heads: int, config: GroupedShape) -> str:
    # [N, H W] or [B, T, H, W] to [B, T, H W'].
    if missing := config.cache_head_dim - config.head_dim:
        # By halves, since what turns together are the two numbers at one place of each.
        x = graph.unflat(x, places.positions, 2 * heads, config.head_dim // 2)
        x = graph.op("Pad", x, graph.ints(0, missing // 2), "", graph.ints(-1))
    return graph.unflat(x, places.positions, heads * config.cache_head_dim)


def _rotate(graph: PlannedGraph, x: str, places: LatentPlaces, **heads: int) -> str:
    # Pairs (x[2i], x[2i+1]) turned, each where it is: `rope.rotate` gives the same in another order, which scores do
    # not depend on.
    return graph.op("RotaryEmbedding", x, *places.rotations, places.positions, interleaved=1, **heads)
