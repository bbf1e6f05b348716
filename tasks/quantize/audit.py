"""What an exported graph really holds: operators, bytes by type, and no layer left float by accident.

Reads the file itself, not what the exporter believes it wrote: tools that quantize in silence skip layers in silence.
"""

from collections import Counter
from pathlib import Path

import onnx
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict

from lm.feed_forward import Experts
from lm.linear import Embedding
from lm.model import LanguageModel
from lm.quantization import Plan, layers
from lm.scheme import Float
from tasks.errors import Refused

_FLOAT_PRODUCTS = {"MatMul", "Gemm"}


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
    quantized_share_of_bytes: float
    quantized_products: int
    float_products: list[str]
    weights: list[Weight]


def expected_products(model: LanguageModel, plan: Plan) -> dict[str, str]:
    """Returns the tensors that the graph of ``model`` must multiply by, each with the operator that must do it."""
    expected = {}
    for name, layer in layers(model).items():
        scheme = plan.of(name)
        parts = [name]
        if isinstance(layer, Experts):
            count = len(layer.gate_up_proj)
            parts = [f"{name}.{index}.{part}" for index in range(count) for part in ("gate_up_proj", "down_proj")]
        # Absorbed into the products around it, which read it as it was rounded.
        absorbed = name.endswith(".kv_b_proj") and not isinstance(scheme, Float)
        operator = "Cast" if absorbed else scheme.operator
        expected.update({scheme.stored(part): operator for part in parts})
    return expected


def audit(path: Path, model: LanguageModel, plan: Plan) -> Audit:
    """Returns the audit of the graph at ``path``. Raises :class:`Refused` that names each layer unlike its plan."""
    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    expected = expected_products(model, plan)
    meant = _routers(model) | {name for name, operator in expected.items() if operator in _FLOAT_PRODUCTS}
    faults = [f"{name} is multiplied in float" for name in sorted(set(_float_weights(graph, tensors)) - meant)]
    faults += _missing_products(graph, tensors, expected) + _float_embeddings(graph, tensors, model)
    if faults:
        raise Refused(f"{path}: the audit refuses this graph: " + "; ".join(faults))
    weights = [_weight(tensor) for tensor in tensors.values()]
    sizes: Counter[str] = Counter()
    for weight in weights:
        sizes[weight.type] += weight.bytes
    return Audit(
        operators=dict(sorted(Counter(node.op_type for node in graph.node).items())),
        bytes_by_type=dict(sorted(sizes.items())),
        quantized_share_of_bytes=round((sizes["int8"] + sizes["uint8"]) / sizes.total(), 4),
        quantized_products=sum(operator not in _FLOAT_PRODUCTS for operator in expected.values()),
        float_products=_float_weights(graph, tensors),
        weights=weights,
    )


def _routers(model: LanguageModel) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if module in model.routers()}


def _float_weights(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto]) -> list[str]:
    return [
        name
        for node in graph.node
        if node.op_type in _FLOAT_PRODUCTS
        for name in node.input
        if name in tensors and tensors[name].data_type == TensorProto.FLOAT and len(tensors[name].dims) >= 2
    ]


def _missing_products(
    graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto], expected: dict[str, str]
) -> list[str]:
    multiplied = {
        (name, node.op_type)
        for node in graph.node
        for name in node.input
        if name in tensors and (node.op_type in _FLOAT_PRODUCTS or tensors[name].data_type != TensorProto.FLOAT)
    }
    return [
        f"{name} is not read by {operator}" for name, operator in expected.items() if (name, operator) not in multiplied
    ]


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
