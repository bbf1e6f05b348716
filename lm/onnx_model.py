"""The graph of a model, written node by node: what a :class:`lm.quantization.Plan` makes of it in floating point is
what onnxruntime computes.

Inputs: ``input_ids`` [batch, length]; ``positions`` [batch, length], where in its text each of them stands, one after
the other from any place on; ``logits_to_keep`` [batch, kept], for which of the ``length`` tokens logits are wanted; and
each layer's caches, named ``past_...``, with room for ``capacity`` tokens (:mod:`lm.onnx_attention` says what they
hold). Outputs: ``logits`` [batch, kept, vocabulary], and ``present_...``, the caches with the new tokens at their
positions. Bound to the memory of the ``past_...`` they are written in place, and nothing is copied.

Rows of unequal length are filled up at their ends. What a filler leaves in a cache lies behind its row's last token,
where nothing reads it, and the next token takes its place.
"""

from pathlib import Path

import numpy as np

from lm.config import LatentConfig, MixtureConfig
from lm.feed_forward import Experts, MixtureOfExperts, Router, SwiGLU
from lm.graph import FLOAT, INT64
from lm.grouped import GroupedAttention
from lm.latent import LatentAttention
from lm.linear import Linear
from lm.model import Block, LanguageModel
from lm.onnx_attention import GroupedPlaces, LatentPlaces, grouped, latent
from lm.packing import mixture_scheme, siblings
from lm.per_token import quantize_weight
from lm.planned_graph import PlannedGraph, array
from lm.quantization import Plan
from lm.scheme import Rows, Sorted


def export(model: LanguageModel, plan: Plan, path: Path) -> None:
    """Writes the graph of ``model`` to ``path`` and its weights beside it; equal models give equal bytes."""
    config = model.config
    graph = PlannedGraph(plan)
    ids = graph.input("input_ids", INT64, ["batch", "length"])
    positions = graph.input("positions", INT64, ["batch", "length"])
    kept = graph.input("logits_to_keep", INT64, ["batch", "kept"])
    rotations = model.model.rotations
    if isinstance(config, LatentConfig):
        shapes: dict[str, list[int | str]] = {"": ["batch", "capacity", config.cache_width]}
    else:
        heads: list[int | str] = ["batch", config.num_key_value_heads, "capacity", config.cache_head_dim]
        shapes = {".key": heads, ".value": heads}
    pasts = [
        [graph.input(f"past_{index}{part}", FLOAT, shape) for part, shape in shapes.items()]
        for index in range(config.num_hidden_layers)
    ]
    with graph.scope("places"):
        places: LatentPlaces | GroupedPlaces
        if isinstance(config, LatentConfig):
            places = LatentPlaces(graph, positions, rotations, config)
        else:
            places = GroupedPlaces(graph, positions, rotations, config)
    x = _embed(graph, model, ids)
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, Block)
        with graph.scope(f"layer_{index}"):
            x, presents = _block(graph, f"model.layers.{index}", layer, x, pasts[index], places)
        for (part, shape), present in zip(shapes.items(), presents, strict=True):
            graph.output(present, f"present_{index}{part}", FLOAT, shape)
    with graph.scope("head"):
        # Before the norm: the head is a fifth of a small model, and a prompt needs its last token's logits alone.
        normed = graph.norm("model.norm", model.model.norm, graph.op("Gather", x, _kept(graph, kept, ids)))
        logits = graph.linear("lm_head", model.lm_head, Rows(graph, normed))
    graph.output(graph.unflat(logits, kept, config.vocab_size), "logits", FLOAT, ["batch", "kept", config.vocab_size])
    graph.save(path)


def choices(router: str) -> str:
    """Returns the name in the graph of the experts [N, K] that the router of that name chose for each token."""
    return f"{router}.chosen"


def _kept(graph: PlannedGraph, kept: str, ids: str) -> str:
    # [batch * kept]: where the wanted tokens stand among all.
    zero, one = graph.weight("zero", np.array(0, np.int64)), graph.weight("one", np.array(1, np.int64))
    batch, length = graph.ops("Split", graph.op("Shape", ids), outputs=2, num_outputs=2)
    numbers = graph.op("Range", zero, graph.op("Squeeze", batch, graph.ints(0)), one)
    firsts = graph.op("Unsqueeze", graph.op("Mul", numbers, length), graph.ints(1))
    return graph.op("Reshape", graph.op("Add", firsts, kept), graph.ints(-1))


def _embed(graph: PlannedGraph, model: LanguageModel, ids: str) -> str:
    name, weight = "model.embed_tokens", model.model.embed_tokens.weight
    flat = graph.op("Reshape", ids, graph.ints(-1))
    if graph.plan.matches(name, graph.plan.in_float):
        return graph.op("Gather", graph.weight(f"{name}.weight", array(weight)), flat)
    integers, scales = quantize_weight(weight.detach())
    rows = graph.op("Gather", graph.weight(f"{name}.int8", integers.numpy()), flat)
    return graph.op(
        "Mul",
        graph.op("Cast", rows, to=FLOAT),
        graph.op("Gather", graph.weight(f"{name}.scales", array(scales)), flat),
    )


def _block(
    graph: PlannedGraph, name: str, block: Block, x: str, pasts: list[str], places: LatentPlaces | GroupedPlaces
) -> tuple[str, list[str]]:
    normed = graph.norm(f"{name}.input_layernorm", block.input_layernorm, x)
    attention = block.self_attn
    if isinstance(attention, LatentAttention):
        assert isinstance(places, LatentPlaces)
        attended, presents = latent(graph, f"{name}.self_attn", attention, normed, pasts, places)
    else:
        assert isinstance(attention, GroupedAttention)
        assert isinstance(places, GroupedPlaces)
        attended, presents = grouped(graph, f"{name}.self_attn", attention, normed, pasts, places)
    x = graph.op("Add", x, attended)
    normed = graph.norm(f"{name}.post_attention_layernorm", block.post_attention_layernorm, x)
    if isinstance(block.mlp, MixtureOfExperts):
        y = _mixture(graph, f"{name}.mlp", block.mlp, normed)
    else:
        assert isinstance(block.mlp, SwiGLU)
        y = _swiglu(graph, f"{name}.mlp", block.mlp, Rows(graph, normed))
    return graph.op("Add", x, y), presents


def _swiglu(graph: PlannedGraph, name: str, layer: SwiGLU, x: Rows) -> str:
    both = graph.packed(name, siblings(layer), x)
    gate, up = graph.ops("Split", both, outputs=2, axis=-1, num_outputs=2)
    return graph.linear(f"{name}.down_proj", layer.down_proj, _hidden(graph, gate, up, layer.down_proj))


def _hidden(graph: PlannedGraph, gate: str, up: str, reader: Linear | Experts) -> Rows:
    # What `down_proj` reads. Twin of `gated`, and of the turn behind it.
    gated = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
    size = (reader.down_proj if isinstance(reader, Experts) else reader.weight).shape[-1]
    return Rows(graph, graph.turned(gated, size, reader.turn))


def _mixture(graph: PlannedGraph, name: str, layer: MixtureOfExperts, x: str) -> str:
    rows, experts = Rows(graph, x), layer.experts
    chosen, weights, scores = _routes(graph, f"{name}.gate", layer.gate, rows)
    if (scheme := mixture_scheme(graph.plan, f"{name}.experts", experts)) is not None:
        # [N, E]: the weight of each expert's output for each token, 0 where it was not chosen.
        gates = graph.op("ScatterElements", graph.op("Mul", scores, graph.number(0.0)), chosen, weights, axis=1)
        parts = experts.gate_up_proj, experts.down_proj
        routed = scheme.mixture(graph, f"{name}.experts", *parts, x, gates, layer.gate.config.num_experts_per_tok)
    else:
        with graph.scope("experts"):
            routed = _routed(graph, f"{name}.experts", experts, rows, chosen, weights)
    if layer.shared_experts is not None:
        return graph.op("Add", _swiglu(graph, f"{name}.shared_experts", layer.shared_experts, rows), routed)
    if layer.shared_expert is not None and layer.shared_expert_gate is not None:
        share = graph.op("Sigmoid", graph.linear(f"{name}.shared_expert_gate", layer.shared_expert_gate, rows))
        shared = _swiglu(graph, f"{name}.shared_expert", layer.shared_expert, rows)
        return graph.op("Add", graph.op("Mul", shared, share), routed)
    return routed


def _routed(graph: PlannedGraph, name: str, experts: Experts, x: Rows, chosen: str, weights: str) -> str:
    # [N, D]: what the K experts that each token chose make of it, weighed and added up.
    count, size, _ = experts.down_proj.shape
    rows, tokens, places = _by_expert(graph, chosen, count)
    both = graph.experts(name, "gate_up_proj", experts.gate_up_proj, x.take(tokens), rows)
    gate, up = graph.ops("Split", both, outputs=2, axis=-1, num_outputs=2)
    out = graph.experts(name, "down_proj", experts.down_proj, _hidden(graph, gate, up, experts), rows)
    by_token = graph.op("Concat", graph.op("Shape", chosen), graph.ints(size), axis=0)
    each = graph.op("Reshape", graph.op("Gather", out, places), by_token)
    weighed = graph.op("Mul", each, graph.op("Unsqueeze", weights, graph.ints(2)))
    return graph.op("ReduceSum", weighed, graph.ints(1), keepdims=0)


def _by_expert(graph: PlannedGraph, chosen: str, count: int) -> tuple[Sorted, str, str]:
    # The choices [N, K] sorted by expert, so that each has its rows in one piece, some none, and all that is not an
    # expert's own product is done once for all; the token of each row [N K], and where each choice went [N K].
    flat = graph.op("Reshape", chosen, graph.ints(-1))
    total = graph.op("Shape", flat)
    owners, order = graph.ops("TopK", flat, total, outputs=2, largest=0)
    # What sorts an order is its inverse.
    _, places = graph.ops("TopK", order, total, outputs=2, largest=0)
    numbers = graph.weight(f"numbers_{count}", np.arange(count).reshape(count, 1))
    is_whose = graph.op("Cast", graph.op("Equal", numbers, flat), to=INT64)
    rows = Sorted(graph.op("ReduceSum", is_whose, graph.ints(1), keepdims=0), owners)
    return rows, graph.op("Div", order, graph.op("Shape", chosen, start=1, end=2)), places


def _routes(graph: PlannedGraph, name: str, router: Router, x: Rows) -> tuple[str, str, str]:
    # The experts [N, K] of each token and their weights [N, K]. Twin of `Router.forward`. And the scores [N, E] of all.
    config = router.config
    products = graph.product(name, router.weight, x)
    if router.e_score_correction_bias is None:
        biased = scores = graph.op("Softmax", products, axis=-1)
    else:
        scores = graph.op("Sigmoid", products)
        biased = graph.op("Add", scores, graph.weight(f"{name}.bias", array(router.e_score_correction_bias)))
    if config.topk_group < config.n_group:
        biased = _mask_groups(graph, biased, config, counted=2 if config.has_bias else 1)
    _, chosen = graph.ops("TopK", biased, graph.ints(config.num_experts_per_tok), outputs=2, axis=-1)
    graph.mark(chosen, choices(name))
    weights = graph.op("GatherElements", scores, chosen, axis=1)
    if config.norm_topk_prob:
        total = graph.op("ReduceSum", weights, graph.ints(-1), keepdims=1)
        weights = graph.op("Div", weights, graph.op("Add", total, graph.number(1e-20)))
    return chosen, graph.op("Mul", weights, graph.number(config.routed_scaling_factor)), scores


def _mask_groups(graph: PlannedGraph, biased: str, config: MixtureConfig, counted: int) -> str:
    # A group counts by the sum of its best ``counted`` experts.
    grouped = graph.op("Reshape", biased, graph.ints(0, config.n_group, -1))
    counts, _ = graph.ops("TopK", grouped, graph.ints(counted), outputs=2, axis=-1)
    strength = graph.op("ReduceSum", counts, graph.ints(-1), keepdims=0)
    _, best = graph.ops("TopK", strength, graph.ints(config.topk_group), outputs=2, axis=-1)
    minus = graph.op("Expand", graph.number(float("-inf")), graph.op("Shape", strength))
    open_ = graph.op("Expand", graph.number(0.0), graph.op("Shape", best))
    mask = graph.op("ScatterElements", minus, best, open_, axis=1)
    masked = graph.op("Add", grouped, graph.op("Unsqueeze", mask, graph.ints(2)))
    return graph.op("Reshape", masked, graph.op("Shape", biased))
