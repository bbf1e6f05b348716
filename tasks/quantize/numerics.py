"""Products of the right operator that still are other products than the ones fine-tuning saw, or slower ones."""

import collections
from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper, numpy_helper

from lm import blockwise, per_token
from lm.blockwise import Blockwise
from lm.graph import nodes_of
from lm.model import LanguageModel
from lm.quantization import Plan
from lm.scheme import Float, Scheme
from lm.static import Range, Static
from tasks.quantize.products import Product, products

_SCALE_AND_POINT = (TensorProto.FLOAT, TensorProto.UINT8)
# What a range of single tokens is computed with; whatever else stands there may mix them.
_OF_A_TOKEN = {"Div", "Sub", "Min", "Max", "Neg", "QuantizeLinear"}
# What gives on a matrix as it is, or a part of it, or its transpose.
_PASSED = {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Split", "Identity"}
# Which operands each product has: the others are zero points of weights and biases, which no plan has.
_OPERANDS = {
    per_token.OPERATOR: {0, 1, 2, 3, 4},
    "MatMulNBits": {0, 1, 2},
    blockwise.MIXTURE: {0, 1, 2, 3, 5, 6, blockwise.GATES},
}
# How far behind a weight its scales stand.
_SCALES_BEHIND = {per_token.OPERATOR: 2, "MatMulNBits": 1, blockwise.MIXTURE: 1}


class Nodes:
    """A graph's nodes and tensors, by what they are called."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.all = list(nodes_of(graph))
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {output: node for node in self.all for output in node.output}
        # By name: a mixture has tens of thousands of products, and each looks up who reads it.
        self.readers: dict[str, list[onnx.NodeProto]] = collections.defaultdict(list)
        for node in self.all:
            for name in {*node.input}:
                self.readers[name].append(node)

    def source(self, name: str) -> str:
        """Returns the tensor, or whatever else, that ``name`` is as it was stored, a part of it or its transpose."""
        node = self.makers.get(name)
        return name if node is None or node.op_type not in _PASSED else self.source(node.input[0])

    def scaled(self, name: str) -> str:
        """Returns the integers that ``name`` is, times their own scale; of anything else, ``name`` itself."""
        scale = self.makers.get(name)
        cast = self.makers.get(scale.input[0]) if scale is not None and scale.op_type == "Mul" else None
        if scale is None or cast is None or cast.op_type != "Cast":
            return name
        integers = cast.input[0]
        return integers if scale.input[1] == scales_name(integers) else name

    def scales_rows(self, lookup: onnx.NodeProto) -> bool:
        """Whether all that reads the integers of ``lookup``, a Gather, multiplies each row by its own scale."""
        table, rows = lookup.input
        casts = self.readers[lookup.output[0]]
        products = [node for cast in casts for node in self.readers[cast.output[0]]]
        # The last operand: what is no product may have one alone.
        scales = [self.makers.get(node.input[-1]) for node in products]
        return (
            {node.op_type for node in casts} == {"Cast"}
            and {node.op_type for node in products} == {"Mul"}
            and all(one is not None and list(one.input) == [scales_name(table), rows] for one in scales)
        )

    def by_owner(self, node: onnx.NodeProto) -> bool:
        """Whether ``node`` looks up a row for each of those that lie sorted: by what is sorted, from the least up."""
        maker = self.makers.get(node.input[1]) if node.op_type == "Gather" else None
        if maker is None or maker.op_type != "TopK" or maker.output[0] != node.input[1]:
            return False
        return any(one.name == "largest" and one.i == 0 for one in maker.attribute)

    def number(self, name: str, kind: int) -> float | None:
        """Returns the constant ``name`` of one number of the type ``kind``, if it is that."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dims or tensor.data_type != kind:
            return None
        return float(numpy_helper.to_array(tensor))


def scales_name(integers: str) -> str:
    """Returns the tensor that holds the scales of the tensor ``integers``."""
    return f"{integers.rpartition('.')[0]}.scales"


def other_numerics(nodes: Nodes, model: LanguageModel, plan: Plan) -> list[str]:
    """Returns what is told of each product that differs from its plan's."""
    expected = {product.scheme.stored(name): product for name, product in products(model, plan).items()}
    most = getattr(model.config, "num_experts_per_tok", 0)
    faults = []
    for node in nodes.all:
        for weight in expected.keys() & set(node.input):
            product = expected[weight]
            if node.op_type in _OPERANDS and not _has_its_own_operands(node, weight):
                faults.append(f"{weight} has other operands than its own scales")
            if node.op_type == "Cast" and not _is_scaled(nodes, node):
                faults.append(f"{weight} is multiplied by other scales than its own")
            if node.op_type == per_token.OPERATOR:
                faults += [f"{weight} {fault}" for fault in _of_integers(nodes, node, product)]
            elif node.op_type == "MatMulNBits" and isinstance(product.scheme, Blockwise):
                wanted = product.scheme.product_attributes(product.outputs, product.inputs)
                faults += [f"{weight} is multiplied with {fault}" for fault in _attributes(node, wanted)]
            elif node.op_type == blockwise.MIXTURE and isinstance(product.scheme, Blockwise):
                wanted = {"k": most, **product.scheme.mixture_attributes()}
                faults += [f"{weight} is multiplied with {fault}" for fault in _attributes(node, wanted)]
                if list(node.input[blockwise.GATES : blockwise.GATES + 1]) != [node.input[1]]:
                    faults.append(f"{weight} is not weighed by the router's gates")
    faults += [
        f"{weight} meets latents that are not rounded as its plan has it"
        for weight, product in expected.items()
        if product.cache and not _latents_are_rounded(nodes, product.cache, product.scheme)
    ]
    return sorted(faults)


def _has_its_own_operands(node: onnx.NodeProto, weight: str) -> bool:
    given = list(node.input)
    place = given.index(weight) + _SCALES_BEHIND[node.op_type]
    has = {index for index, name in enumerate(given) if name}
    return has <= _OPERANDS[node.op_type] and given[place : place + 1] == [scales_name(weight)]


def _is_scaled(nodes: Nodes, cast: onnx.NodeProto) -> bool:
    """Whether all that reads ``cast``, integers as fp32, multiplies them by their own scales."""
    readers = nodes.readers[cast.output[0]]
    return bool(readers) and all(nodes.scaled(node.output[0]) == cast.input[0] for node in readers)


def _latents_are_rounded(nodes: Nodes, cache: str, scheme: Scheme) -> bool:
    """Whether what ``cache`` gets of new tokens is rounded as an operand of ``scheme`` is."""
    if isinstance(scheme, Float):
        return True
    writes = [node for node in nodes.readers[cache] if node.op_type == "ScatterND"]
    new = [nodes.makers.get(node.input[2]) for node in writes]
    # Behind the latents lie the rotary keys, which are not.
    joined = [one.input[0] for one in new if one is not None and one.op_type == "Concat"]
    return bool(writes) and len(joined) == len(writes) and all(_is_rounded(nodes, one, scheme) for one in joined)


def _is_rounded(nodes: Nodes, name: str, scheme: Scheme) -> bool:
    node = nodes.makers.get(name)
    while node is not None and node.op_type in ("Slice", "Flatten"):
        node = nodes.makers.get(node.input[0])
    # A constant is made of nothing.
    before = None if node is None or not node.input else nodes.makers.get(node.input[0])
    if node is None or before is None:
        return False
    if isinstance(scheme, Blockwise):
        return (node.op_type, before.op_type) == ("Mul", "Round")
    if (node.op_type, before.op_type) != ("DequantizeLinear", "QuantizeLinear") or node.input[1:] != before.input[1:]:
        return False
    if len(before.input) != 1 + len(_SCALE_AND_POINT):
        return False
    if isinstance(scheme, Static):
        within = scheme.within
        given = [nodes.number(one, kind) for one, kind in zip(before.input[1:], _SCALE_AND_POINT, strict=True)]
        return within is not None and given == [within.scale, within.zero]
    return all(_is_of_a_token(nodes, one, before.input[0]) for one in before.input[1:])


def _of_integers(nodes: Nodes, product: onnx.NodeProto, expected: Product) -> Iterator[str]:
    weight = product.input[1]
    if weight in nodes.tensors and nodes.tensors[weight].data_type != TensorProto.INT8:
        yield "is not signed, so its product runs 3 times slower"
    finished, sums = product, per_token.sums_name(weight.removesuffix(".int8"))
    if is_expert := expected.expert is not None:
        found = _together(nodes, product, expected.expert)
        if found is None:
            yield "does not have the rows of its own expert"
            return
        # All experts' products are finished in one go, each row with the sums of its own expert.
        finished, sums = found, per_token.sums_name(expected.part)
    quantizes = _quantizes(nodes, product.input[0], is_expert)
    if isinstance(expected.scheme, Static):
        if not _lies_within(expected.scheme.within, nodes, product, quantizes):
            yield "meets activations that are not unsigned 8 bits of its calibrated range"
        return
    if not _has_a_scale_a_token(nodes, product, quantizes):
        yield "meets activations without a scale a token in unsigned 8 bits"
    if not _takes_out_the_zero_points(nodes, finished, sums, is_expert):
        yield "does not take out its tokens' zero points and scales"


def _has_a_scale_a_token(nodes: Nodes, product: onnx.NodeProto, node: onnx.NodeProto | None) -> bool:
    if node is None or not any(one.name == "axis" and one.i == 0 for one in node.attribute):
        return False
    point = nodes.makers.get(node.input[2])
    types = [] if point is None else [one.i for one in point.attribute if one.name == "output_dtype"]
    # The tokens' own scales and zero points come behind the product.
    return (
        types == [TensorProto.UINT8]
        and _constants_of(nodes, product) == [1.0, per_token.MIDDLE]
        and all(_is_of_a_token(nodes, name, node.input[0]) for name in node.input[1:])
    )


def _is_of_a_token(nodes: Nodes, name: str, x: str) -> bool:
    """Whether ``name`` is computed of the least and the largest value of each row of ``x``, and of constants."""
    reduced: set[str] = set()

    def looks_at_rows(name: str) -> bool:
        node = nodes.makers.get(name)
        if node is None:
            return name in nodes.tensors
        if node.op_type in ("ReduceMin", "ReduceMax"):
            reduced.add(node.op_type)
            return node.input[0] == x and _axes(nodes, node) == [-1]
        return node.op_type in _OF_A_TOKEN and all(map(looks_at_rows, node.input))

    # A zero point is where the least value lies, and both are in a scale.
    return looks_at_rows(name) and reduced == {"ReduceMin", "ReduceMax"}


def _axes(nodes: Nodes, node: onnx.NodeProto) -> list[int]:
    axes = nodes.tensors.get(node.input[1]) if len(node.input) > 1 else None
    return [] if axes is None else numpy_helper.to_array(axes).tolist()


def _together(nodes: Nodes, product: onnx.NodeProto, number: int) -> onnx.NodeProto | None:
    """Returns the node that puts the rows of all experts together; None unless number ``number`` has those of its own.

    They are that piece of what is sorted by expert, and stand in that place again.
    """
    apart, readers = nodes.makers.get(product.input[0]), nodes.readers[product.output[0]]
    if apart is None or apart.op_type != "Split" or [node.op_type for node in readers] != ["Concat"]:
        return None
    (together,) = readers
    pieces, places = list(apart.output), list(together.input)
    if any(one.name == "axis" and one.i != 0 for node in (apart, together) for one in node.attribute):
        return None
    # How many rows each has is for the router to say.
    if len(pieces) != len(places) or apart.input[1] in nodes.tensors:
        return None
    own = pieces.index(product.input[0]), places.index(product.output[0])
    return together if own == (number, number) else None


def _takes_out_the_zero_points(nodes: Nodes, product: onnx.NodeProto, sums: str, by_row: bool) -> bool:
    """Whether all that reads ``product`` takes the zero points' share from it, and multiplies by the tokens' scales.

    The ``sums`` of the weight's columns are the same for all rows, or looked up ``by_row`` by whose each is.
    """
    readers = nodes.readers[product.output[0]]
    for node in readers:
        zeros = nodes.makers.get(node.input[1]) if node.op_type == "Sub" else None
        if zeros is None or zeros.op_type != "Mul":
            return False
        makers = [nodes.makers.get(name) for name in zeros.input] if by_row else []
        by_owner = [maker.input[0] for maker in makers if maker is not None and nodes.by_owner(maker)]
        if sums not in (by_owner if by_row else zeros.input):
            return False
        if any(reader.op_type != "Mul" for reader in nodes.readers[node.output[0]]):
            return False
    return bool(readers)


def _lies_within(within: Range | None, nodes: Nodes, product: onnx.NodeProto, node: onnx.NodeProto | None) -> bool:
    if node is None or within is None:
        return False
    # The product takes out the scale and the zero point that the activations were given.
    given = [nodes.number(name, kind) for name, kind in zip(node.input[1:], _SCALE_AND_POINT, strict=False)]
    return given == _constants_of(nodes, product) == [within.scale, within.zero]


def _constants_of(nodes: Nodes, product: onnx.NodeProto) -> list[float | None]:
    """The scale of activations and their zero point that ``product`` itself takes out."""
    names = (product.input[index] if index < len(product.input) else "" for index in (2, 4))
    return [nodes.number(name, kind) for name, kind in zip(names, _SCALE_AND_POINT, strict=True)]


def _quantizes(nodes: Nodes, activations: str, is_expert: bool) -> onnx.NodeProto | None:
    node = nodes.makers.get(activations)
    while is_expert and node is not None and node.op_type in ("Gather", "Split"):
        # An expert has a piece of what is quantized for all of them: of their hidden values, or of the tokens, sorted.
        node = nodes.makers.get(node.input[0])
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def _attributes(node: onnx.NodeProto, wanted: dict[str, int | float | str]) -> Iterator[str]:
    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    for name, value in wanted.items():
        if given.get(name) != (value.encode() if isinstance(value, str) else value):
            yield f"{name} {given.get(name)}, not {value}"
