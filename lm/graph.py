"""A small writer of ONNX graphs: one call a node, names that tell where a node comes from."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 23
IR_VERSION = 11
# Of a token, a channel or a block of zeros, which stay zeros so; far below any scale that matters.
SMALLEST_SCALE = 1e-12


class Graph:
    """Collects nodes and initializers in order, so that equal models give equal bytes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._scope: list[str] = []
        self._count = 0

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of the nodes added inside."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def op(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output and returns that output's name."""
        return self.ops(operator, *inputs, outputs=1, **attributes)[0]

    def ops(self, operator: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Adds a node with several outputs and returns their names."""
        self._count += 1
        name = "/".join([*self._scope, f"{operator}_{self._count}"])
        names = [name if outputs == 1 else f"{name}:{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=name, **attributes))
        return names

    def either(self, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """Adds the nodes of both; a run computes those of ``then`` if ``condition``, of one element, is true.

        Each returns the name of its fp32 result, and may read what was added before. Nothing that either adds can be
        read outside it, but for initializers.
        """
        branches = {}
        for name, build in (("then_branch", then), ("else_branch", otherwise)):
            outside, self.nodes = self.nodes, []
            result = helper.make_tensor_value_info(build(), FLOAT, None)
            branches[name] = helper.make_graph(self.nodes, name, [], [result])
            self.nodes = outside
        return self.op("If", condition, **branches)

    def weight(self, name: str, value: npt.NDArray[Any]) -> str:
        """Adds the initializer ``name`` once and returns its name."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def ints(self, *values: int) -> str:
        """Returns the name of a one-dimensional int64 constant, shared by all who ask for the same."""
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def number(self, value: float) -> str:
        """Returns the name of a scalar fp32 constant, shared by all who ask for the same."""
        return self.weight(f"number_{value!r}", np.array(value, dtype=np.float32))

    def input(self, name: str, kind: int, shape: list[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value: str, name: str, kind: int, shape: list[int | str]) -> None:
        """Makes ``value``, which a node has computed, the graph's output and calls it ``name``.

        It is not copied for that: what writes a cache writes it where the caller wants it.
        """
        self.rename(value, name)
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def rename(self, value: str, name: str, since: int = 0) -> None:
        """Calls ``name`` what is ``value`` so far, which only nodes from the number ``since`` on compute and read."""
        for node in _all_nodes(self.nodes[since:]):
            for names in (node.input, node.output):
                for index, found in enumerate(names):
                    if found == value:
                        names[index] = name

    def mark(self, value: str, name: str) -> None:
        """Gives ``value`` the name ``name`` as well, for whoever wants to see it: a run computes no more for it."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"mark/{name}"))

    def save(self, path: Path) -> None:
        """Checks the graph and writes it to ``path``, its weights to ``path`` with ``.data`` appended."""
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, initializer=list(self.initializers.values())
        )
        versions = {"": OPSET, **{node.domain: 1 for node in nodes_of(graph) if node.domain}}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in versions.items()],
            ir_version=IR_VERSION,
            producer_name="overnight",
        )
        onnx.save_model(
            model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data",
            size_threshold=1024,
        )  # fmt: skip
        onnx.checker.check_model(path, full_check=True)


def rounded_in_blocks(graph: Graph, x: str, width: int, size: int) -> str:
    """Returns ``x`` [N, width] rounded to 8 bits in blocks of ``size``: what onnxruntime multiplies by such weights."""
    # Filled up to whole blocks, as the kernel does it.
    missing = -width % size
    padded = graph.op("Pad", x, graph.ints(0, 0, 0, missing)) if missing else x
    blocks = graph.op("Reshape", padded, graph.ints(0, (width + missing) // size, size))
    scales = graph.op("ReduceMax", graph.op("Abs", blocks), graph.ints(-1), keepdims=1)
    scales = graph.op("Div", scales, graph.number(127.0))
    inverse = graph.op("Div", graph.number(1.0), graph.op("Max", scales, graph.number(SMALLEST_SCALE)))
    rounded = graph.op("Mul", graph.op("Round", graph.op("Mul", blocks, inverse)), scales)
    flat = graph.op("Flatten", rounded)
    return graph.op("Slice", flat, graph.ints(0), graph.ints(width), graph.ints(1)) if missing else flat


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yields the nodes of ``graph`` and of the branches in it."""
    yield from _all_nodes(graph.node)


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


FLOAT, INT64, INT32, UINT8, INT8 = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.UINT8,
    TensorProto.INT8,
)
