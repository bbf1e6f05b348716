"""What an exported graph really holds: operators, bytes by type, and no layer left float, or made INT8, by accident.

Reads the file itself, not what the exporter believes it wrote: tools that quantize in silence skip layers in silence.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel, ConfigDict

from lm import blockwise, per_token
from lm.blockwise import Blockwise
from lm.feed_forward import Experts
from lm.graph import nodes_of
from lm.linear import Embedding
from lm.model import LanguageModel
from lm.packing import mixture_scheme, packed_products
from lm.planned_graph import turn_name
from lm.quantization import Plan, layers
from lm.scheme import Float, Scheme
from lm.static import Range, Static
from tasks.errors import Refused

_FLOAT_PRODUCTS = {"MatMul", "Gemm"}
_SCALE_AND_POINT = (TensorProto.FLOAT, TensorProto.UINT8)


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
        if name.endswith(".kv_b_proj") and not isinstance(product.scheme, Float)
        else product.operator
        for name, product in _products(model, plan).items()
    }


def audit(path: Path, model: LanguageModel, plan: Plan) -> Audit:
    """Returns the audit of the graph at ``path``. Raises :class:`Refused` that names each layer unlike its plan."""
    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    expected = expected_products(model, plan)
    in_float = [*sorted(_routers(model)), *_turns(model)]
    meant = {*in_float} | {name for name, operator in expected.items() if operator in _FLOAT_PRODUCTS}
    faults = [f"{name} is multiplied in float" for name in sorted(set(_float_weights(graph, tensors)) - meant)]
    faults += _missing_products(graph, tensors, expected | dict.fromkeys(in_float, "MatMul"))
    faults += _unturned(graph, model, plan)
    faults += _other_numerics(graph, tensors, model, plan) + _coarse_scales(tensors, model, plan)
    faults += _float_embeddings(graph, tensors, model)
    if faults:
        raise Refused(f"{path}: the audit refuses this graph: " + "; ".join(faults))
    weights = [_weight(tensor) for tensor in tensors.values()]
    sizes: Counter[str] = Counter()
    for weight in weights:
        sizes[weight.type] += weight.bytes
    return Audit(
        operators=dict(sorted(Counter(node.op_type for node in nodes_of(graph)).items())),
        bytes_by_type=dict(sorted(sizes.items())),
        quantized_share_of_bytes=round((sizes["int8"] + sizes["uint8"]) / sizes.total(), 4),
        quantized_products=sum(operator not in _FLOAT_PRODUCTS for operator in expected.values()),
        # What turns is one tensor for all layers, and each has a product with it.
        float_products=[*dict.fromkeys(_float_weights(graph, tensors))],
        weights=weights,
    )


def _routers(model: LanguageModel) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if module in model.routers()}


def _turned(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The layers whose inputs are turned while the model runs, by name, and the turn of each."""
    return {name: layer.turn for name, layer in layers(model).items() if layer.turn is not None}


def _turns(model: LanguageModel) -> list[str]:
    return sorted({turn_name(len(turn)) for turn in _turned(model).values()})


def _unturned(graph: onnx.GraphProto, model: LanguageModel, plan: Plan) -> list[str]:
    """Products whose weights are turned and whose activations are not, or the other way round."""
    makers = {output: node for node in nodes_of(graph) for output in node.output}
    turned = _turned(model)
    expected = {}
    for name, product in _products(model, plan).items():
        layer = next((one for one in turned if f"{name}.".startswith(f"{one}.") and name.endswith("down_proj")), None)
        expected[product.scheme.stored(name)] = None if layer is None else turn_name(len(turned[layer]))
    faults = []
    for node in nodes_of(graph):
        for weight in expected.keys() & set(node.input):
            found, wanted = _turn_before(makers, node), expected[weight]
            if found != wanted:
                faults.append(f"{weight} meets activations turned by {found or 'nothing'}, not {wanted or 'nothing'}")
    return sorted(faults)


def _turn_before(makers: dict[str, onnx.NodeProto], product: onnx.NodeProto) -> str | None:
    node = makers.get(product.input[0])
    while node is not None and node.op_type in {"QuantizeLinear", "Gather", "Reshape"}:
        node = makers.get(node.input[0])
    if node is None or node.op_type != "MatMul" or not node.input[1].startswith("turn_"):
        return None
    return node.input[1]


def _float_weights(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto]) -> list[str]:
    return [
        name
        for node in nodes_of(graph)
        if node.op_type in _FLOAT_PRODUCTS
        for name in node.input
        if name in tensors and tensors[name].data_type == TensorProto.FLOAT and len(tensors[name].dims) >= 2
    ]


def _missing_products(
    graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto], expected: dict[str, str]
) -> list[str]:
    multiplied = {
        (name, node.op_type)
        for node in nodes_of(graph)
        for name in node.input
        if name in tensors and (node.op_type in _FLOAT_PRODUCTS or tensors[name].data_type != TensorProto.FLOAT)
    }
    return [
        f"{name} is not read by {operator}" for name, operator in expected.items() if (name, operator) not in multiplied
    ]


def _other_numerics(
    graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto], model: LanguageModel, plan: Plan
) -> list[str]:
    """Products of the right operator that still are other products than the ones fine-tuning saw, or slower ones."""
    makers = {output: node for node in nodes_of(graph) for output in node.output}
    schemes = {product.scheme.stored(name): product.scheme for name, product in _products(model, plan).items()}
    faults = []
    for node in nodes_of(graph):
        for weight in schemes.keys() & set(node.input):
            scheme = schemes[weight]
            if node.op_type == per_token.OPERATOR:
                if tensors[weight].data_type != TensorProto.INT8:
                    faults.append(f"{weight} is not signed, so its product runs 3 times slower")
                if isinstance(scheme, Static):
                    if not _lies_within(scheme.within, makers, tensors, node):
                        faults.append(
                            f"{weight} meets activations that are not unsigned 8 bits of its calibrated range"
                        )
                elif not _has_a_scale_a_token(makers, tensors, node):
                    faults.append(f"{weight} meets activations without a scale a token in unsigned 8 bits")
            if node.op_type == "MatMulNBits":
                level = next((one.i for one in node.attribute if one.name == "accuracy_level"), 0)
                if level != blockwise.ACCURACY_LEVEL:
                    faults.append(f"{weight} is multiplied at accuracy level {level}, not {blockwise.ACCURACY_LEVEL}")
            if node.op_type == blockwise.MIXTURE and isinstance(scheme, Blockwise):
                given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
                for name, value in scheme.mixture_attributes().items():
                    if given.get(name) != (value.encode() if isinstance(value, str) else value):
                        faults.append(f"{weight} is multiplied with {name} {given.get(name)}, not {value}")
    return sorted(faults)


def _has_a_scale_a_token(
    makers: dict[str, onnx.NodeProto], tensors: dict[str, onnx.TensorProto], product: onnx.NodeProto
) -> bool:
    node = _quantizes(makers, product.input[0])
    if node is None:
        return False
    point = makers.get(node.input[2])
    by_token = any(one.name == "axis" and one.i == 0 for one in node.attribute) and node.input[1] not in tensors
    types = [] if point is None else [one.i for one in point.attribute if one.name == "output_dtype"]
    # The tokens' own scales and zero points come behind the product.
    return by_token and types == [TensorProto.UINT8] and _constants_of(product, tensors) == [1.0, per_token.MIDDLE]


def _lies_within(
    within: Range | None,
    makers: dict[str, onnx.NodeProto],
    tensors: dict[str, onnx.TensorProto],
    product: onnx.NodeProto,
) -> bool:
    node = _quantizes(makers, product.input[0])
    if node is None or within is None:
        return False
    # The product takes out the scale and the zero point that the activations were given.
    given = [_number(tensors, name, kind) for name, kind in zip(node.input[1:], _SCALE_AND_POINT, strict=False)]
    return given == _constants_of(product, tensors) == [within.scale, within.zero]


def _constants_of(product: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]) -> list[float | None]:
    """The scale of activations and their zero point that ``product`` itself takes out."""
    names = (product.input[index] if index < len(product.input) else "" for index in (2, 4))
    return [_number(tensors, name, kind) for name, kind in zip(names, _SCALE_AND_POINT, strict=True)]


def _number(tensors: dict[str, onnx.TensorProto], name: str, kind: int) -> float | None:
    tensor = tensors.get(name)
    if tensor is None or tensor.dims or tensor.data_type != kind:
        return None
    return float(numpy_helper.to_array(tensor))


def _quantizes(makers: dict[str, onnx.NodeProto], activations: str) -> onnx.NodeProto | None:
    node = makers.get(activations)
    while node is not None and node.op_type == "Gather":
        # An expert takes its tokens from those that are quantized already.
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def _coarse_scales(tensors: dict[str, onnx.TensorProto], model: LanguageModel, plan: Plan) -> list[str]:
    """Weights with fewer scales than their plan has: those of a whole matrix share one where a tool has it so."""
    wanted = {
        f"{name}.scales": len(module.weight) for name, module in model.named_modules() if isinstance(module, Embedding)
    }
    for name, product in _products(model, plan).items():
        if (levels := product.scheme.levels) is not None:
            wanted[f"{name}.scales"] = product.outputs * math.ceil(product.inputs / (levels.group or product.inputs))
    return [
        f"{name} holds {found} scales, not {count}"
        for name, count in wanted.items()
        if (found := math.prod(tensors[name].dims) if name in tensors else 0) != count
    ]


@dataclass(frozen=True)
class _Product:
    scheme: Scheme
    operator: str
    outputs: int
    inputs: int


def _products(model: LanguageModel, plan: Plan) -> dict[str, _Product]:
    """What the graph multiplies by: a layer, layers that are packed into one, and each expert's two parts."""
    found: dict[str, _Product] = {}
    for name, layer in layers(model).items():
        if isinstance(layer, Experts):
            found |= _of_experts(name, layer, plan)
        else:
            scheme = plan.of(name)
            found[name] = _Product(scheme, scheme.operator, *layer.weight.shape)
    for name, parts in packed_products(model, plan).items():
        packed = [found.pop(part) for part in parts]
        found[name] = replace(packed[0], outputs=sum(part.outputs for part in packed))
    return found


def _of_experts(name: str, experts: Experts, plan: Plan) -> dict[str, _Product]:
    found: dict[str, _Product] = {}
    one_node = mixture_scheme(plan, name, experts)
    for part in ("gate_up_proj", "down_proj"):
        count, outputs, inputs = getattr(experts, part).shape
        if one_node is None:
            scheme = plan.of(name, f"{name}.{part}")
            each = _Product(scheme, scheme.operator, outputs, inputs)
            found |= {f"{name}.{index}.{part}": each for index in range(count)}
        else:
            if part == "gate_up_proj":
                # Filled up to whole blocks of what `down_proj` reads.
                outputs = 2 * one_node.size * math.ceil(outputs / 2 / one_node.size)
            found[f"{name}.{part}"] = _Product(one_node, blockwise.MIXTURE, count * outputs, inputs)
    return found


def _float_embeddings(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto], model: LanguageModel) -> list[str]:
    shapes = [list(module.weight.shape) for module in model.modules() if isinstance(module, Embedding)]
    return [
        f"{node.input[0]} is looked up in float"
        for node in nodes_of(graph)
        if node.op_type == "Gather" and node.input[0] in tensors
        if tensors[node.input[0]].data_type == TensorProto.FLOAT and list(tensors[node.input[0]].dims) in shapes
    ]


def _weight(tensor: onnx.TensorProto) -> Weight:
    count = 1
    for dimension in tensor.dims:
        count *= dimension
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return Weight(name=tensor.name, type=str(dtype), shape=list(tensor.dims), bytes=count * dtype.itemsize)
