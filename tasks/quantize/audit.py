"""What an exported graph really holds: operators, bytes by type, and no layer left float, or made INT8, by accident.

Reads the file itself, not what the exporter believes it wrote: tools that quantize in silence skip layers in silence.
"""

import math
from collections import Counter
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from pydantic import BaseModel, ConfigDict

from lm.linear import Embedding
from lm.model import LanguageModel
from lm.norm import RMSNorm
from lm.planned_graph import turn_name
from lm.quantization import Plan, layers
from lm.scheme import Float
from tasks.errors import Refused
from tasks.quantize.numerics import Nodes, other_numerics
from tasks.quantize.products import products

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
    # The expansion of latents is absorbed into the products around it, which read it as it was rounded.
    return {
        product.scheme.stored(name): "Cast"
        if product.cache and not isinstance(product.scheme, Float)
        else product.operator
        for name, product in products(model, plan).items()
    }


def audit(path: Path, model: LanguageModel, plan: Plan) -> Audit:
    """Returns the audit of the graph at ``path``. Raises :class:`Refused` that names each layer unlike its plan."""
    nodes = Nodes(onnx.load(path, load_external_data=False).graph)
    tensors = nodes.tensors
    expected = expected_products(model, plan)
    turns = _turns(model)
    meant = {*turns} | {name for name, operator in expected.items() if operator in _FLOAT_PRODUCTS}
    faults = [f"{name} is multiplied in float" for name in sorted(set(_float_weights(nodes)) - meant)]
    faults += _missing_products(nodes, expected | dict.fromkeys(turns, "MatMul"))
    faults += _unturned(nodes, model, plan)
    faults += other_numerics(nodes, model, plan) + _coarse_scales(tensors, model, plan)
    faults += _other_embeddings(nodes, model, plan) + _other_norms(nodes, model, plan)
    if faults:
        raise Refused(f"{path}: the audit refuses this graph: " + "; ".join(faults))
    weights = [_weight(tensor) for tensor in tensors.values()]
    sizes: Counter[str] = Counter()
    for weight in weights:
        sizes[weight.type] += weight.bytes
    return Audit(
        operators=dict(sorted(Counter(node.op_type for node in nodes.all).items())),
        bytes_by_type=dict(sorted(sizes.items())),
        quantized_share_of_bytes=round((sizes["int8"] + sizes["uint8"]) / sizes.total(), 4),
        quantized_products=sum(operator not in _FLOAT_PRODUCTS for operator in expected.values()),
        # What turns is one tensor for all layers, and each has a product with it.
        float_products=[*dict.fromkeys(_float_weights(nodes))],
        weights=weights,
    )


def _turned(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The layers whose inputs are turned while the model runs, by name, and the turn of each."""
    return {name: turn for name, layer in layers(model).items() if (turn := getattr(layer, "turn", None)) is not None}


def _turns(model: LanguageModel) -> list[str]:
    return sorted({turn_name(len(turn)) for turn in _turned(model).values()})


def _unturned(nodes: Nodes, model: LanguageModel, plan: Plan) -> list[str]:
    """Products whose weights are turned and whose activations are not, or the other way round."""
    turned = _turned(model)
    expected = {}
    for name, product in products(model, plan).items():
        layer = next((one for one in turned if f"{name}.".startswith(f"{one}.") and name.endswith("down_proj")), None)
        expected[product.scheme.stored(name)] = None if layer is None else turn_name(len(turned[layer]))
    faults = []
    for node in nodes.all:
        for weight in expected.keys() & set(node.input):
            found, wanted = _turn_before(nodes.makers, node), expected[weight]
            if found != wanted:
                faults.append(f"{weight} meets activations turned by {found or 'nothing'}, not {wanted or 'nothing'}")
    return sorted(faults)


def _turn_before(makers: dict[str, onnx.NodeProto], product: onnx.NodeProto) -> str | None:
    node = makers.get(product.input[0])
    while node is not None and node.op_type in {"QuantizeLinear", "Gather", "Split", "Reshape"}:
        node = makers.get(node.input[0])
    if node is None or node.op_type != "MatMul" or not node.input[1].startswith("turn_"):
        return None
    return node.input[1]


def _float_weights(nodes: Nodes) -> list[str]:
    return [name for name, _ in _float_products(nodes)]


def _float_products(nodes: Nodes) -> list[tuple[str, str]]:
    # Each weight and what multiplies by it; also where that is a part of it, or its transpose.
    return [
        (name, node.op_type)
        for node in nodes.all
        if node.op_type in _FLOAT_PRODUCTS
        for name in map(nodes.source, node.input)
        if name in nodes.tensors
        and nodes.tensors[name].data_type == TensorProto.FLOAT
        and len(nodes.tensors[name].dims) >= 2
    ]


def _missing_products(nodes: Nodes, expected: dict[str, str]) -> list[str]:
    multiplied = {*_float_products(nodes)} | {
        (name, node.op_type)
        for node in nodes.all
        for name in node.input
        if name in nodes.tensors and nodes.tensors[name].data_type != TensorProto.FLOAT
    }
    return [
        f"{name} is not read by {operator}" for name, operator in expected.items() if (name, operator) not in multiplied
    ]


def _coarse_scales(tensors: dict[str, onnx.TensorProto], model: LanguageModel, plan: Plan) -> list[str]:
    """Weights with fewer scales than their plan has: those of a whole matrix share one where a tool has it so."""
    wanted = {
        f"{name}.scales": len(module.weight)
        for name, module in _embeddings(model).items()
        if not plan.matches(name, plan.in_float)
    }
    if plan.norms == "int8":
        wanted |= {f"{name}.scales": 1 for name in _norms(model)}
    for name, product in products(model, plan).items():
        if (levels := product.scheme.levels) is not None:
            wanted[f"{name}.scales"] = product.outputs * math.ceil(product.inputs / (levels.group or product.inputs))
    return [
        f"{name} holds {found} scales, not {count}"
        for name, count in wanted.items()
        if (found := math.prod(tensors[name].dims) if name in tensors else 0) != count
    ]


def _embeddings(model: LanguageModel) -> dict[str, Embedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Embedding)}


def _other_embeddings(nodes: Nodes, model: LanguageModel, plan: Plan) -> list[str]:
    """Embeddings that are looked up in float without being meant to be, and those that are not looked up as meant."""
    widths = [[module.weight.shape[1]] for module in _embeddings(model).values()]
    # A row for each expert is no embedding.
    looked_up = {node.input[0] for node in nodes.all if node.op_type == "Gather" and not nodes.by_owner(node)}
    floating = {
        name
        for name in looked_up & nodes.tensors.keys()
        if nodes.tensors[name].data_type == TensorProto.FLOAT and list(nodes.tensors[name].dims[1:]) in widths
    }
    in_float = {name for name in _embeddings(model) if plan.matches(name, plan.in_float)}
    in_float_weights = {f"{name}.weight" for name in in_float}
    meant = in_float_weights | {f"{name}.int8" for name in _embeddings(model).keys() - in_float}
    return [
        *(f"{name} is looked up in float" for name in sorted(floating - in_float_weights)),
        *(f"{name} is not looked up" for name in sorted(meant - looked_up)),
        *(
            f"{node.input[0]} is not scaled row by row"
            for node in nodes.all
            if node.op_type == "Gather" and node.input[0] in meant - in_float_weights and not nodes.scales_rows(node)
        ),
    ]


def _norms(model: LanguageModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, RMSNorm)]


def _other_norms(nodes: Nodes, model: LanguageModel, plan: Plan) -> list[str]:
    """Norms that are multiplied by other weights than those meant, or by none that are stored."""
    ending = "int8" if plan.norms == "int8" else "weight"
    meant = {f"{name}.{ending}" for name in _norms(model)}
    found = {nodes.scaled(node.input[1]) for node in nodes.all if node.op_type == "RMSNormalization"}
    return [
        *(f"{name} weighs a norm" for name in sorted(found - meant)),
        *(f"{name} weighs no norm" for name in sorted(meant - found)),
    ]


def _weight(tensor: onnx.TensorProto) -> Weight:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    size = math.prod(tensor.dims) * dtype.itemsize
    return Weight(name=tensor.name, type=str(dtype), shape=list(tensor.dims), bytes=size)
