"""What quantizers get wrong in silence, each planted in a graph of INT8."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from lm import per_token

UP = "model.layers.0.mlp.gate_proj+up_proj"
EXPERT = "model.layers.1.mlp.experts.2.down_proj"


def float_of(path: Path, name: str) -> onnx.ModelProto:
    """The graph with the INT8 product by ``name`` replaced by one in float, as a careless exporter would leave it."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight = numpy_helper.to_array(tensor).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, f"{name}.float"))
    node = next(node for node in model.graph.node if name in node.input)
    node.op_type = "MatMul" if node.op_type == per_token.OPERATOR else node.op_type
    node.input[list(node.input).index(name)] = f"{name}.float"
    return model


def tensor_of(planted: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in planted.graph.initializer if tensor.name == name)


def reader_of(planted: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in planted.graph.node if name in node.input)


def scale_a_tensor(planted: onnx.ModelProto) -> None:
    # As quantize_dynamic has it: a token's result depends on its batch.
    product = reader_of(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    dynamic = onnx.helper.make_node("DynamicQuantizeLinear", [quantize.input[0]], ["whole", "scale", "zero"])
    planted.graph.node.append(dynamic)
    product.input[0] = "whole"


def one_constant_scale(planted: onnx.ModelProto) -> None:
    product = reader_of(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    planted.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale_of_all"))
    quantize.input[1] = "scale_of_all"


def signed_activations(planted: onnx.ModelProto) -> None:
    product = reader_of(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    point = next(node for node in planted.graph.node if quantize.input[2] in node.output)
    next(one for one in point.attribute if one.name == "output_dtype").i = onnx.TensorProto.INT8


def another_zero(planted: onnx.ModelProto) -> None:
    # As a pass would have it that takes the middle of signed 8 bits for that of unsigned ones.
    planted.graph.initializer.append(numpy_helper.from_array(np.array(127, np.uint8), "another_zero"))
    reader_of(planted, f"{UP}.int8").input[4] = "another_zero"


def a_scale_for_all(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale_for_all"))
    reader_of(planted, f"{UP}.int8").input[2] = "scale_for_all"


def one_range_a_batch(planted: onnx.ModelProto) -> None:
    # Given to each token as if it were its own.
    planted.graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "all_axes"))
    product = reader_of(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    for node in [node for node in planted.graph.node if node.op_type in ("ReduceMin", "ReduceMax")]:
        if node.input[0] == quantize.input[0]:
            name = node.output[0]
            node.input[1], node.output[0] = "all_axes", f"{name}.whole"
            length = onnx.helper.make_node("Shape", [node.input[0]], [f"{name}.length"], start=0, end=1)
            planted.graph.node.extend(
                [length, onnx.helper.make_node("Expand", [f"{name}.whole", f"{name}.length"], [name])]
            )


def axis(planted: onnx.ModelProto) -> None:
    # A scale a channel, where there are as many tokens as channels.
    product = reader_of(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    next(one for one in quantize.attribute if one.name == "axis").i = 1


def another_tokens_scale(planted: onnx.ModelProto) -> None:
    # Of the values before the norm.
    product = reader_of(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    norm = next(node for node in planted.graph.node if quantize.input[0] in node.output)
    for node in [node for node in planted.graph.node if node.op_type in ("ReduceMin", "ReduceMax")]:
        if node.input[0] == quantize.input[0]:
            node.input[0] = norm.input[0]


def zero_points_kept(planted: onnx.ModelProto) -> None:
    product = reader_of(planted, f"{UP}.int8")
    sub = reader_of(planted, product.output[0])
    reader_of(planted, sub.output[0]).input[0] = product.output[0]


def scales_kept(planted: onnx.ModelProto) -> None:
    product = reader_of(planted, f"{UP}.int8")
    sub = reader_of(planted, product.output[0])
    scaled = reader_of(planted, sub.output[0])
    reader_of(planted, scaled.output[0]).input[0] = sub.output[0]


def maker_of(planted: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in planted.graph.node if name in node.output)


def another_experts_place(planted: onnx.ModelProto) -> None:
    together = reader_of(planted, reader_of(planted, f"{EXPERT}.int8").output[0])
    together.input[1], together.input[2] = together.input[2], together.input[1]


def another_experts_rows(planted: onnx.ModelProto) -> None:
    apart = maker_of(planted, reader_of(planted, f"{EXPERT}.int8").input[0])
    apart.output[1], apart.output[2] = apart.output[2], apart.output[1]


def one_expert_too_few(planted: onnx.ModelProto) -> None:
    del reader_of(planted, reader_of(planted, f"{EXPERT}.int8").output[0]).input[3]


def as_many_rows_each(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.array([8, 8, 8, 8]), "eight_each"))
    maker_of(planted, reader_of(planted, f"{EXPERT}.int8").input[0]).input[1] = "eight_each"


def zero_points_of_unsorted_rows(planted: onnx.ModelProto) -> None:
    looked_up = reader_of(planted, f"{EXPERT.replace('.2.', '.')}.sums")
    looked_up.input[1] = maker_of(planted, looked_up.input[1]).input[0]


def zero_points_from_the_last_expert_down(planted: onnx.ModelProto) -> None:
    sorts = maker_of(planted, reader_of(planted, f"{EXPERT.replace('.2.', '.')}.sums").input[1])
    next(one for one in sorts.attribute if one.name == "largest").i = 1


def put_together_for_nothing(planted: onnx.ModelProto) -> None:
    product = reader_of(planted, "lm_head.int8")
    sub = reader_of(planted, product.output[0])
    planted.graph.node.append(onnx.helper.make_node("Concat", [product.output[0]], ["together"], axis=0))
    sub.input[0] = "together"


def zero_points_of_one_channel(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros(96, np.int64), "the_first"))
    zeros = reader_of(planted, f"{UP}.sums")
    planted.graph.node.append(onnx.helper.make_node("Gather", [f"{UP}.sums", "the_first"], ["of_the_first"]))
    zeros.input[:] = ["of_the_first" if name == f"{UP}.sums" else name for name in zeros.input]


def a_part_of_the_activations(planted: onnx.ModelProto) -> None:
    product = reader_of(planted, f"{UP}.int8")
    planted.graph.node.append(
        onnx.helper.make_node("Split", [product.input[0]], ["the_part", "the_rest"], axis=0, num_outputs=2)
    )
    product.input[0] = "the_part"


def embedding_of_something_else(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros((257, 32), np.int8), "another"))
    reader_of(planted, "model.embed_tokens.int8").input[0] = "another"


def one_experts_zero_points(planted: onnx.ModelProto) -> None:
    # As if all had the first one's weights.
    name = EXPERT.replace(".2.", ".")
    sums = numpy_helper.to_array(tensor_of(planted, f"{name}.sums"))[0]
    planted.graph.initializer.append(numpy_helper.from_array(sums, "sums_of_the_first"))
    looked_up = reader_of(planted, f"{name}.sums").output[0]
    product = reader_of(planted, looked_up)
    product.input[:] = ["sums_of_the_first" if one == looked_up else one for one in product.input]


def experts_scale_a_tensor(planted: onnx.ModelProto) -> None:
    product = reader_of(planted, f"{EXPERT}.int8")
    split = next(node for node in planted.graph.node if product.input[0] in node.output)
    quantize = next(node for node in planted.graph.node if split.input[0] in node.output)
    dynamic = onnx.helper.make_node("DynamicQuantizeLinear", [quantize.input[0]], ["whole", "scale", "zero"])
    planted.graph.node.append(dynamic)
    split.input[0] = "whole"


def float_embedding_of_more_rows(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros((300, 32), np.float32), "wide.float"))
    reader_of(planted, "model.embed_tokens.int8").input[0] = "wide.float"


def transposed_in_float(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros((32, 32), np.float32), "tied.float"))
    planted.graph.node.append(onnx.helper.make_node("Transpose", ["tied.float"], ["tied"]))
    planted.graph.node.append(onnx.helper.make_node("MatMul", ["hidden", "tied"], ["more"]))


def unsigned_weight(planted: onnx.ModelProto) -> None:
    tensor = tensor_of(planted, f"{UP}.int8")
    shifted = (numpy_helper.to_array(tensor).astype(np.int16) + 128).astype(np.uint8)
    tensor.CopyFrom(numpy_helper.from_array(shifted, tensor.name))


def one_scale(name: str) -> Callable[[onnx.ModelProto], None]:
    def plant(planted: onnx.ModelProto) -> None:
        tensor = tensor_of(planted, name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).ravel()[:1], name))

    return plant


def gemm(planted: onnx.ModelProto) -> None:
    # What the quantizer for MatMulNBits passes over without a word.
    tensor = tensor_of(planted, f"{UP}.int8")
    weight = numpy_helper.to_array(tensor).astype(np.float32)
    planted.graph.initializer.append(numpy_helper.from_array(weight, f"{UP}.float"))
    product = reader_of(planted, tensor.name)
    product.op_type = "Gemm"
    product.input[1] = f"{UP}.float"


def dequantized(planted: onnx.ModelProto) -> None:
    # Small on disk, and a product in float all the same.
    product = reader_of(planted, f"{UP}.int8")
    planted.graph.node.append(onnx.helper.make_node("Cast", [f"{UP}.int8"], ["wide"], to=onnx.TensorProto.FLOAT))
    product.op_type = "MatMul"
    product.input[1] = "wide"


def router_in_int8(planted: onnx.ModelProto) -> None:
    # Excluded by a name that another pass had changed; it chooses other experts then.
    name = "model.layers.1.mlp.gate.weight"
    tensor = tensor_of(planted, name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int8), name))
    reader_of(planted, name).op_type = per_token.OPERATOR


def stacked_experts_in_float(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 32, 32), np.float32), "experts.float"))
    planted.graph.node.append(onnx.helper.make_node("MatMul", ["hidden", "experts.float"], ["experts"]))


def scale_a_token(planted: onnx.ModelProto) -> None:
    product = reader_of(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    planted.graph.node.append(onnx.helper.make_node("Abs", [quantize.input[0]], ["by_token"]))
    quantize.input[1] = "by_token"


def zero_point_forgotten(planted: onnx.ModelProto) -> None:
    del reader_of(planted, f"{UP}.int8").input[4]


def signed_range(planted: onnx.ModelProto) -> None:
    product = reader_of(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    planted.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "signed"))
    quantize.input[2] = product.input[4] = "signed"


def added(planted: onnx.ModelProto, name: str, values: np.ndarray) -> str:
    planted.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def one_scale_for_all_channels(planted: onnx.ModelProto) -> None:
    # Those of the channels are still there, and nobody reads them.
    product = reader_of(planted, f"{UP}.scales")
    product.input[list(product.input).index(f"{UP}.scales")] = added(
        planted, "of_all_channels", np.array(0.1, np.float32)
    )


def another_experts_scales(planted: onnx.ModelProto) -> None:
    reader_of(planted, f"{EXPERT}.int8").input[3] = f"{EXPERT.replace('.2.', '.1.')}.scales"


def weights_zero_point(planted: onnx.ModelProto) -> None:
    reader_of(planted, f"{UP}.int8").input.append(added(planted, "zero_point", np.array(3, np.int8)))


def zero_points_of_blocks(planted: onnx.ModelProto) -> None:
    zeros = np.full(tensor_of(planted, f"{UP}.scales").dims, 120, np.uint8)
    reader_of(planted, f"{UP}.int8").input.append(added(planted, "zero_points", zeros))


def bias_of_blocks(planted: onnx.ModelProto) -> None:
    bias = np.ones(tensor_of(planted, f"{UP}.scales").dims[0], np.float32)
    reader_of(planted, f"{UP}.int8").input.extend(["", "", added(planted, "bias", bias)])


def bias_of_experts(planted: onnx.ModelProto) -> None:
    node = next(node for node in planted.graph.node if node.op_type == "QMoE")
    node.input[4] = added(planted, "bias", np.ones(tensor_of(planted, node.input[3]).dims[:2], np.float32))


def scales_of_experts(planted: onnx.ModelProto) -> None:
    node = next(node for node in planted.graph.node if node.op_type == "QMoE")
    node.input[6] = added(planted, "ones", np.ones(tensor_of(planted, node.input[6]).dims, np.float32))


def embedding_a_scale_for_all(planted: onnx.ModelProto) -> None:
    looked_up = reader_of(planted, "model.embed_tokens.scales").output[0]
    product = reader_of(planted, looked_up)
    product.input[list(product.input).index(looked_up)] = added(planted, "of_all_rows", np.array(0.1, np.float32))


def embedding_without_its_scales(planted: onnx.ModelProto) -> None:
    cast = reader_of(planted, reader_of(planted, "model.embed_tokens.int8").output[0])
    planted.graph.node.append(onnx.helper.make_node("Identity", [cast.output[0]], ["integers"]))


def embedding_the_first_rows_scale(planted: onnx.ModelProto) -> None:
    reader_of(planted, "model.embed_tokens.scales").input[1] = added(planted, "first", np.zeros(1, np.int64))


def latents_in_float(planted: onnx.ModelProto) -> None:
    # What a token leaves in the cache is as the norm gives it.
    joined = maker_of(planted, reader_of(planted, "past_1").input[2])
    norm = maker_of(planted, joined.input[0])
    while norm.op_type != "RMSNormalization":
        norm = maker_of(planted, norm.input[0])
    joined.input[0] = norm.output[0]


def latents_without_a_zero_point(planted: onnx.ModelProto) -> None:
    # The least value of each token becomes 0.
    back = maker_of(planted, maker_of(planted, reader_of(planted, "past_1").input[2]).input[0])
    for node in (back, maker_of(planted, back.input[0])):
        del node.input[2:]


def latents_of_no_token(planted: onnx.ModelProto) -> None:
    value = numpy_helper.from_array(np.zeros(1, np.float32))
    planted.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["nothing"], value=value))
    maker_of(planted, reader_of(planted, "past_1").input[2]).input[0] = "nothing"


def cache_of_no_token(planted: onnx.ModelProto) -> None:
    latents_of_no_token(planted)
    reader_of(planted, "past_1").input[2] = "nothing"


def latents_rounded_within_another_range(planted: onnx.ModelProto) -> None:
    joined = maker_of(planted, reader_of(planted, "past_1").input[2])
    product = reader_of(planted, f"{UP}.int8")
    others = next(node for node in planted.graph.node if product.input[0] in node.output).input[1:]
    back = maker_of(planted, joined.input[0])
    for node in (back, maker_of(planted, back.input[0])):
        node.input[1:] = others


def expansion_without_its_scales(planted: onnx.ModelProto) -> None:
    scales = "model.layers.1.self_attn.kv_b_proj.scales"
    product = reader_of(planted, scales)
    product.input[1] = added(planted, "ones", np.ones(tensor_of(planted, scales).dims, np.float32))
