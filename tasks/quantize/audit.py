"""What an exported INT8 graph really holds: operators, bytes by type, and no layer left float by accident.

Reads the file itself, not what the exporter believes it wrote: tools that quantize in silence skip layers in silence.
"""

from collections import Counter
from pathlib import Path

import onnx
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict

from lm.feed_forward import Experts
from lm.linear import Embedding, Linear
from lm.model import LanguageModel
from tasks.errors import Refused

_PRODUCTS = {"MatMul", "Gemm", "MatMulInteger"}


class Weight(BaseModel):
    """One stored tensor of the graph."""

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    shape: list[int]
    bytes: int


class Audit(BaseModel):
    """``models/int8/audit.json``."""

    model_config = ConfigDict(frozen=True)

    operators: dict[str, int]
    bytes_by_type: dict[str, int]
    int8_share_of_bytes: float
    int8_products: int
    float_products: list[str]
    weights: list[Weight]


def expected_products(model: LanguageModel) -> list[str]:
    """Returns the INT8 tensors that the graph of ``model`` must multiply by, one for each layer and expert."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            names.append(f"{name}.int8")
        elif isinstance(module, Experts):
            for index in range(len(module.gate_up_proj)):
                names += [f"{name}.{index}.gate_up_proj.int8", f"{name}.{index}.down_proj.int8"]
    return names


def audit(path: Path, model: LanguageModel) -> Audit:
    """Returns the audit of the graph at ``path``. Raises :class:`Refused` that names each layer that is not INT8."""
    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    faults = _float_products(graph, tensors, model) + _missing_products(graph, tensors, model)
    faults += _float_embeddings(graph, tensors, model)
    if faults:
        raise Refused(f"{path}: the audit refuses this graph: " + "; ".join(faults))
    weights = [_weight(tensor) for tensor in tensors.values()]
    sizes: Counter[str] = Counter()
    for weight in weights:
        sizes[weight.type] += weight.bytes
    return Audit(
        operators=dict(sorted(Counter(node.op_type for node in graph.node).items())),
        bytes_by_type=dict(sorted(sizes.items())),
        int8_share_of_bytes=round(sizes["int8"] / sizes.total(), 4),
        int8_products=sum(node.op_type == "MatMulInteger" for node in graph.node),
        float_products=_float_weights_of_products(graph, tensors),
        weights=weights,
    )


def _routers(model: LanguageModel) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if module in model.routers()}


def _float_weights_of_products(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto]) -> list[str]:
    return [
        name
        for node in graph.node
        if node.op_type in _PRODUCTS
        for name in node.input
        if name in tensors and tensors[name].data_type == TensorProto.FLOAT and len(tensors[name].dims) >= 2
    ]


def _float_products(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto], model: LanguageModel) -> list[str]:
    left = sorted(set(_float_weights_of_products(graph, tensors)) - _routers(model))
    return [f"{name} is multiplied in float" for name in left]


def _missing_products(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto], model: LanguageModel) -> list[str]:
    multiplied = {
        name
        for node in graph.node
        if node.op_type == "MatMulInteger"
        for name in node.input
        if name in tensors and tensors[name].data_type == TensorProto.INT8
    }
    return [f"{name} is not multiplied in INT8" for name in expected_products(model) if name not in multiplied]


def _float_embeddings(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto], model: LanguageModel) -> list[str]:
    shapes = [list(module.weight.shape) for module in model.modules() if isinstance(module, Embedding)]
    return [
        f"{node.input[0]} is looked up in float"
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] in tensors
        if tensors[node.input[0]].data_type == TensorProto.FLOAT and list(tensors[node.input[0]].dims) in shapes
    ]


def _weight(tensor: onnx.TensorProto) -> Weight:
    count = 1
    for dimension in tensor.dims:
        count *= dimension
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return Weight(name=tensor.name, type=str(dtype), shape=list(tensor.dims), bytes=count * dtype.itemsize)
