"""The graph of a model in ONNX's own operators alone, for runtimes that do not know onnxruntime's. Imports no torch.

Computes the same numbers, the order of sums aside. Experts in blocks are two products of stacked weights, of all
experts for all tokens: nothing depends on what a router chose, at the cost of those that it did not choose.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from lm.graph import FLOAT, Graph, rounded_in_blocks

Array = npt.NDArray[Any]


def write(source: Path, target: Path) -> None:
    """Writes the graph in ``source`` to ``target`` so, and its weights beside it; equal graphs give equal bytes."""
    model = onnx.load(source)
    graph = _Rewritten(model.graph)
    for node in model.graph.node:
        graph.take(node)
    graph.drop_what_nobody_reads()
    graph.save(target)


class _Rewritten(Graph):
    def __init__(self, read: onnx.GraphProto) -> None:
        super().__init__(read.name)
        self.inputs, self.outputs = list(read.input), list(read.output)
        self.initializers = {tensor.name: tensor for tensor in read.initializer}
        self._mask: str | None = None

    def take(self, node: onnx.NodeProto) -> None:
        """Adds ``node``, or what computes the same."""
        if not node.domain:
            self.nodes.append(node)
            return
        before = len(self.nodes)
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        with self.scope(node.name):
            results = _WRITTEN_OUT[node.op_type](self, [*node.input], attributes)
        for result, name in zip(results, node.output, strict=True):
            self.rename(result, name, before)

    def array(self, name: str) -> Array:
        return numpy_helper.to_array(self.initializers[name])

    def mask(self, capacity_of: str) -> str:
        """Returns [B, 1, T, S]: 0 where a token sees a place of the cache, which is up to its own, else -inf."""
        if self._mask is None:
            zero, one = self.weight("zero", np.array(0, np.int64)), self.weight("one", np.array(1, np.int64))
            capacity = self.op("Squeeze", self.op("Shape", capacity_of, start=2, end=3), self.ints(0))
            places = self.op("Range", zero, capacity, one)
            positions = self.op("Unsqueeze", "positions", self.ints(1, 3))
            sees = self.op("LessOrEqual", places, positions)
            self._mask = self.op("Where", sees, self.number(0.0), self.number(float("-inf")))
        return self._mask

    def blocks(self, values: str, scales: str, bits: int, size: int, width: int) -> str:
        """Returns the fp32 values [..., width, rows] of packed ``values`` with a scale for each ``size`` of a row.

        Turned for the product by them: so onnxruntime makes one operator of both again.
        """
        packed, by_block = self.array(values), self.array(scales)
        leading = packed.shape[: packed.ndim - 1 - (packed.ndim > by_block.ndim)]
        packed = packed.reshape(*leading, -1)
        if bits == 4:
            packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*leading, -1)
        integers = (packed.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)[..., :width]
        kind = ml_dtypes.int4 if bits == 4 else np.int8
        signed = self.weight(f"{values}.signed", integers.astype(kind).swapaxes(-1, -2))
        each = self.weight(f"{scales}.by_block", by_block.reshape(*leading, -1).swapaxes(-1, -2))
        return self.op("DequantizeLinear", signed, each, axis=len(leading) - 1, block_size=size)

    def drop_what_nobody_reads(self) -> None:
        """Removes nodes and weights that no output needs."""
        wanted = {value.name for value in self.outputs}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(_read_by(node))
        self.nodes = kept[::-1]
        self.initializers = {name: tensor for name, tensor in self.initializers.items() if name in wanted}


def _read_by(node: onnx.NodeProto) -> set[str]:
    found = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            found.update(*map(_read_by, attribute.g.node), (value.name for value in attribute.g.output))
    return found


def _integers(graph: _Rewritten, inputs: list[str], attributes: dict[str, Any]) -> list[str]:
    # MatMulIntegerToFloat.
    values, weight, scale, by_channel, zero = inputs
    product = graph.op("Cast", graph.op("MatMulInteger", values, weight, zero), to=FLOAT)
    both = graph.weight(f"{by_channel}.both", graph.array(by_channel) * graph.array(scale))
    return [graph.op("Mul", product, both)]


def _blocks(graph: _Rewritten, inputs: list[str], attributes: dict[str, Any]) -> list[str]:
    # MatMulNBits.
    x, values, scales = inputs
    bits, size = attributes["bits"], attributes["block_size"]
    weight = graph.blocks(values, scales, bits, size, attributes["K"])
    return [graph.op("MatMul", rounded_in_blocks(graph, x, attributes["K"], size), weight)]


def _mixture(graph: _Rewritten, inputs: list[str], attributes: dict[str, Any]) -> list[str]:
    # QMoE, of all experts for all tokens: [E, N, ...]. Gates are 0 where an expert was not chosen.
    x, gates, into, into_scales, _, out, out_scales = inputs[:7]
    bits, size = attributes["expert_weight_bits"], attributes["block_size"]
    experts, pairs, packed = graph.array(into).shape
    width, inner = packed * (8 // bits), pairs // 2
    first, second = (
        graph.blocks(values, scales, bits, size, inputs)
        for values, scales, inputs in ((into, into_scales, width), (out, out_scales, inner))
    )
    both = graph.op("MatMul", rounded_in_blocks(graph, x, width, size), first)
    both = graph.op("Reshape", both, graph.ints(0, 0, inner, 2))
    gate, up = (
        graph.op("Gather", both, graph.weight(name, np.array(place, np.int64)), axis=3)
        for place, name in enumerate(("zero", "one"))
    )
    hidden = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
    flat = rounded_in_blocks(graph, graph.op("Reshape", hidden, graph.ints(-1, inner)), inner, size)
    each = graph.op("MatMul", graph.op("Reshape", flat, graph.ints(experts, -1, inner)), second)
    gates = graph.op("Unsqueeze", graph.op("Transpose", gates, perm=[1, 0]), graph.ints(2))
    return [graph.op("ReduceSum", graph.op("Mul", each, gates), graph.ints(0), keepdims=0)]


def _attention(graph: _Rewritten, inputs: list[str], attributes: dict[str, Any]) -> list[str]:
    # GroupQueryAttention. Queries [B, G, R T, W] of the R heads that share keys stand side by side.
    q, k, v, past_keys, past_values, _, _, cos, sin = inputs
    heads, groups = attributes["num_heads"], attributes["kv_num_heads"]
    width = 2 * graph.array(cos).shape[1]
    scale = attributes.get("scale", width**-0.5)
    if not k:
        q, k, v = graph.ops("Split", q, graph.ints(heads * width, groups * width, groups * width), outputs=3, axis=-1)
    q, k, v = (
        graph.op("Transpose", graph.op("Reshape", part, graph.ints(0, 0, count, width)), perm=[0, 2, 1, 3])
        for part, count in ((q, heads), (k, groups), (v, groups))
    )
    q, k = (graph.op("RotaryEmbedding", part, cos, sin, "positions") for part in (q, k))
    places = graph.op("Expand", graph.op("Unsqueeze", "positions", graph.ints(1, 3)), graph.op("Shape", k))
    keys, values = (
        graph.op("ScatterElements", past, places, new, axis=2) for past, new in ((past_keys, k), (past_values, v))
    )
    by_group = graph.op("Reshape", q, graph.ints(0, groups, -1, width))
    scores = graph.op("MatMul", by_group, graph.op("Transpose", keys, perm=[0, 1, 3, 2]))
    by_head = graph.op("Concat", graph.ints(0, heads, -1), graph.op("Shape", keys, start=2, end=3), axis=0)
    scores = graph.op("Mul", graph.op("Reshape", scores, by_head), graph.number(scale))
    found = graph.op("Softmax", graph.op("Add", scores, graph.mask(past_keys)), axis=-1)
    side_by_side = graph.op("Concat", graph.ints(0, groups, -1), graph.op("Shape", keys, start=2, end=3), axis=0)
    read = graph.op("MatMul", graph.op("Reshape", found, side_by_side), values)
    read = graph.op("Transpose", graph.op("Reshape", read, graph.ints(0, heads, -1, width)), perm=[0, 2, 1, 3])
    return [graph.op("Reshape", read, graph.ints(0, 0, -1)), keys, values]


_WRITTEN_OUT: dict[str, Callable[[_Rewritten, list[str], dict[str, Any]], list[str]]] = {
    "MatMulIntegerToFloat": _integers,
    "MatMulNBits": _blocks,
    "QMoE": _mixture,
    "GroupQueryAttention": _attention,
}
