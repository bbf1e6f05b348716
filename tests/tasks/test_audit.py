"""The audit of a quantized graph finds what was planted, and nothing else."""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from odd import make_grouped
from onnx import numpy_helper

from lm import hugging_face, onnx_model, per_token
from lm.calibration import calibrate
from lm.model import LanguageModel
from lm.quantization import PLANS
from lm.rotation import turn_hidden
from tasks.errors import Refused
from tasks.quantize.audit import audit, expected_products

PLAN = PLANS["per-token-8"]


@pytest.fixture
def model(trained: Path) -> LanguageModel:
    return hugging_face.load(trained / "models/float")


@pytest.fixture
def graph(model: LanguageModel, tmp_path: Path) -> Path:
    onnx_model.export(model, PLAN, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_audit_counts_what_the_graph_holds(graph: Path, model: LanguageModel) -> None:
    found = audit(graph, model, PLAN)
    expected = expected_products(model, PLAN)
    # All but the router.
    assert found.quantized_products == len(expected) - 1
    assert found.operators[per_token.OPERATOR] == [*expected.values()].count(per_token.OPERATOR)
    # The expansion of the latents is absorbed by the products around it.
    absorbed = [name for name, operator in expected.items() if operator == "Cast"]
    assert absorbed == [f"model.layers.{layer}.self_attn.kv_b_proj.int8" for layer in range(2)]
    assert found.float_products == ["model.layers.1.mlp.gate.weight"]
    stored = {weight.name: weight for weight in found.weights}
    assert stored["model.embed_tokens.int8"].type == "int8"
    int8 = sum(weight.bytes for weight in found.weights if weight.type == "int8")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "gate.weight" not in name)
    assert found.bytes_by_type["int8"] == int8 == matrices


def _float_of(path: Path, name: str) -> onnx.ModelProto:
    """The graph with the INT8 product by ``name`` replaced by one in float, as a careless exporter would leave it."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight = numpy_helper.to_array(tensor).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, f"{name}.float"))
    node = next(node for node in model.graph.node if name in node.input)
    node.op_type = "MatMul" if node.op_type == per_token.OPERATOR else node.op_type
    node.input[list(node.input).index(name)] = f"{name}.float"
    return model


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.int8",
        "model.layers.0.self_attn.q_proj+kv_a_proj_with_mqa.int8",
        "model.layers.1.mlp.experts.2.down_proj.int8",
        "model.layers.1.mlp.shared_experts.gate_proj+up_proj.int8",
    ],
)
def test_a_layer_left_float_is_named(name: str, graph: Path, model: LanguageModel) -> None:
    onnx.save(_float_of(graph, name), graph)
    told = re.escape(name)
    operator = per_token.OPERATOR
    with pytest.raises(Refused, match=rf"{told}\.float is multiplied in float.*{told} is not read by {operator}"):
        audit(graph, model, PLAN)


def test_a_float_embedding_is_named(graph: Path, model: LanguageModel) -> None:
    planted = onnx.load(graph)
    name = "model.embed_tokens.int8"
    tensor = next(tensor for tensor in planted.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))
    onnx.save(planted, graph)
    with pytest.raises(Refused, match=r"embed_tokens\.int8 is looked up in float"):
        audit(graph, model, PLAN)


def _tensor(planted: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in planted.graph.initializer if tensor.name == name)


def _reader(planted: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in planted.graph.node if name in node.input)


UP = "model.layers.0.mlp.gate_proj+up_proj"
_UP = re.escape(UP)


def _scale_a_tensor(planted: onnx.ModelProto) -> None:
    # As quantize_dynamic has it: a token's result depends on its batch.
    product = _reader(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    dynamic = onnx.helper.make_node("DynamicQuantizeLinear", [quantize.input[0]], ["whole", "scale", "zero"])
    planted.graph.node.append(dynamic)
    product.input[0] = "whole"


def _one_constant_scale(planted: onnx.ModelProto) -> None:
    product = _reader(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    planted.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale_of_all"))
    quantize.input[1] = "scale_of_all"


def _signed_activations(planted: onnx.ModelProto) -> None:
    product = _reader(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    point = next(node for node in planted.graph.node if quantize.input[2] in node.output)
    next(one for one in point.attribute if one.name == "output_dtype").i = onnx.TensorProto.INT8


def _another_zero(planted: onnx.ModelProto) -> None:
    # As a pass would have it that takes the middle of signed 8 bits for that of unsigned ones.
    planted.graph.initializer.append(numpy_helper.from_array(np.array(127, np.uint8), "another_zero"))
    _reader(planted, f"{UP}.int8").input[4] = "another_zero"


def _a_scale_for_all(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale_for_all"))
    _reader(planted, f"{UP}.int8").input[2] = "scale_for_all"


def _one_range_a_batch(planted: onnx.ModelProto) -> None:
    # Given to each token as if it were its own.
    planted.graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "all_axes"))
    product = _reader(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    for node in [node for node in planted.graph.node if node.op_type in ("ReduceMin", "ReduceMax")]:
        if node.input[0] == quantize.input[0]:
            name = node.output[0]
            node.input[1], node.output[0] = "all_axes", f"{name}.whole"
            length = onnx.helper.make_node("Shape", [node.input[0]], [f"{name}.length"], start=0, end=1)
            planted.graph.node.extend(
                [length, onnx.helper.make_node("Expand", [f"{name}.whole", f"{name}.length"], [name])]
            )


def _axis(planted: onnx.ModelProto) -> None:
    # A scale a channel, where there are as many tokens as channels.
    product = _reader(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    next(one for one in quantize.attribute if one.name == "axis").i = 1


def _another_tokens_scale(planted: onnx.ModelProto) -> None:
    # Of the values before the norm.
    product = _reader(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    norm = next(node for node in planted.graph.node if quantize.input[0] in node.output)
    for node in [node for node in planted.graph.node if node.op_type in ("ReduceMin", "ReduceMax")]:
        if node.input[0] == quantize.input[0]:
            node.input[0] = norm.input[0]


def _zero_points_kept(planted: onnx.ModelProto) -> None:
    product = _reader(planted, f"{UP}.int8")
    sub = _reader(planted, product.output[0])
    _reader(planted, sub.output[0]).input[0] = product.output[0]


def _scales_kept(planted: onnx.ModelProto) -> None:
    product = _reader(planted, f"{UP}.int8")
    sub = _reader(planted, product.output[0])
    scaled = _reader(planted, sub.output[0])
    _reader(planted, scaled.output[0]).input[0] = sub.output[0]


EXPERT = "model.layers.1.mlp.experts.2.down_proj"
_EXPERT = re.escape(EXPERT)


def _maker(planted: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in planted.graph.node if name in node.output)


def _another_experts_place(planted: onnx.ModelProto) -> None:
    together = _reader(planted, _reader(planted, f"{EXPERT}.int8").output[0])
    together.input[1], together.input[2] = together.input[2], together.input[1]


def _another_experts_rows(planted: onnx.ModelProto) -> None:
    apart = _maker(planted, _reader(planted, f"{EXPERT}.int8").input[0])
    apart.output[1], apart.output[2] = apart.output[2], apart.output[1]


def _one_expert_too_few(planted: onnx.ModelProto) -> None:
    del _reader(planted, _reader(planted, f"{EXPERT}.int8").output[0]).input[3]


def _as_many_rows_each(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.array([8, 8, 8, 8]), "eight_each"))
    _maker(planted, _reader(planted, f"{EXPERT}.int8").input[0]).input[1] = "eight_each"


def _zero_points_of_unsorted_rows(planted: onnx.ModelProto) -> None:
    looked_up = _reader(planted, f"{EXPERT.replace('.2.', '.')}.sums")
    looked_up.input[1] = _maker(planted, looked_up.input[1]).input[0]


def _zero_points_from_the_last_expert_down(planted: onnx.ModelProto) -> None:
    sorts = _maker(planted, _reader(planted, f"{EXPERT.replace('.2.', '.')}.sums").input[1])
    next(one for one in sorts.attribute if one.name == "largest").i = 1


def _put_together_for_nothing(planted: onnx.ModelProto) -> None:
    product = _reader(planted, "lm_head.int8")
    sub = _reader(planted, product.output[0])
    planted.graph.node.append(onnx.helper.make_node("Concat", [product.output[0]], ["together"], axis=0))
    sub.input[0] = "together"


def _zero_points_of_one_channel(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros(96, np.int64), "the_first"))
    zeros = _reader(planted, f"{UP}.sums")
    planted.graph.node.append(onnx.helper.make_node("Gather", [f"{UP}.sums", "the_first"], ["of_the_first"]))
    zeros.input[:] = ["of_the_first" if name == f"{UP}.sums" else name for name in zeros.input]


def _a_part_of_the_activations(planted: onnx.ModelProto) -> None:
    product = _reader(planted, f"{UP}.int8")
    planted.graph.node.append(
        onnx.helper.make_node("Split", [product.input[0]], ["the_part", "the_rest"], axis=0, num_outputs=2)
    )
    product.input[0] = "the_part"


def _embedding_of_something_else(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros((257, 32), np.int8), "another"))
    _reader(planted, "model.embed_tokens.int8").input[0] = "another"


def _one_experts_zero_points(planted: onnx.ModelProto) -> None:
    # As if all had the first one's weights.
    name = EXPERT.replace(".2.", ".")
    sums = numpy_helper.to_array(_tensor(planted, f"{name}.sums"))[0]
    planted.graph.initializer.append(numpy_helper.from_array(sums, "sums_of_the_first"))
    looked_up = _reader(planted, f"{name}.sums").output[0]
    product = _reader(planted, looked_up)
    product.input[:] = ["sums_of_the_first" if one == looked_up else one for one in product.input]


def _experts_scale_a_tensor(planted: onnx.ModelProto) -> None:
    product = _reader(planted, f"{EXPERT}.int8")
    split = next(node for node in planted.graph.node if product.input[0] in node.output)
    quantize = next(node for node in planted.graph.node if split.input[0] in node.output)
    dynamic = onnx.helper.make_node("DynamicQuantizeLinear", [quantize.input[0]], ["whole", "scale", "zero"])
    planted.graph.node.append(dynamic)
    split.input[0] = "whole"


def _float_embedding_of_more_rows(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros((300, 32), np.float32), "wide.float"))
    _reader(planted, "model.embed_tokens.int8").input[0] = "wide.float"


def _transposed_in_float(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros((32, 32), np.float32), "tied.float"))
    planted.graph.node.append(onnx.helper.make_node("Transpose", ["tied.float"], ["tied"]))
    planted.graph.node.append(onnx.helper.make_node("MatMul", ["hidden", "tied"], ["more"]))


def _unsigned_weight(planted: onnx.ModelProto) -> None:
    tensor = _tensor(planted, f"{UP}.int8")
    shifted = (numpy_helper.to_array(tensor).astype(np.int16) + 128).astype(np.uint8)
    tensor.CopyFrom(numpy_helper.from_array(shifted, tensor.name))


def _one_scale(name: str) -> Callable[[onnx.ModelProto], None]:
    def plant(planted: onnx.ModelProto) -> None:
        tensor = _tensor(planted, name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).ravel()[:1], name))

    return plant


def _gemm(planted: onnx.ModelProto) -> None:
    # What the quantizer for MatMulNBits passes over without a word.
    tensor = _tensor(planted, f"{UP}.int8")
    weight = numpy_helper.to_array(tensor).astype(np.float32)
    planted.graph.initializer.append(numpy_helper.from_array(weight, f"{UP}.float"))
    product = _reader(planted, tensor.name)
    product.op_type = "Gemm"
    product.input[1] = f"{UP}.float"


def _dequantized(planted: onnx.ModelProto) -> None:
    # Small on disk, and a product in float all the same.
    product = _reader(planted, f"{UP}.int8")
    planted.graph.node.append(onnx.helper.make_node("Cast", [f"{UP}.int8"], ["wide"], to=onnx.TensorProto.FLOAT))
    product.op_type = "MatMul"
    product.input[1] = "wide"


def _router_in_int8(planted: onnx.ModelProto) -> None:
    # Excluded by a name that another pass had changed; it chooses other experts then.
    name = "model.layers.1.mlp.gate.weight"
    tensor = _tensor(planted, name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int8), name))
    _reader(planted, name).op_type = per_token.OPERATOR


def _stacked_experts_in_float(planted: onnx.ModelProto) -> None:
    planted.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 32, 32), np.float32), "experts.float"))
    planted.graph.node.append(onnx.helper.make_node("MatMul", ["hidden", "experts.float"], ["experts"]))


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (_scale_a_tensor, rf"{_UP}\.int8 meets activations without a scale a token"),
        (_one_constant_scale, rf"{_UP}\.int8 meets activations without a scale a token"),
        (_signed_activations, rf"{_UP}\.int8 meets activations without a scale a token in unsigned 8 bits"),
        (_another_zero, rf"{_UP}\.int8 meets activations without a scale a token"),
        (_a_scale_for_all, rf"{_UP}\.int8 meets activations without a scale a token"),
        (_unsigned_weight, rf"{_UP}\.int8 is not signed, so its product runs 3 times slower"),
        (_one_scale(f"{UP}.scales"), rf"{_UP}\.scales holds 1 scales, not 96"),
        (_one_scale("model.embed_tokens.scales"), r"model\.embed_tokens\.scales holds 1 scales, not 257"),
        (_gemm, rf"{_UP}\.float is multiplied in float.*{_UP}\.int8 is not read by MatMulIntegerToFloat"),
        (_dequantized, rf"{_UP}\.int8 is not read by MatMulIntegerToFloat"),
        (_router_in_int8, r"model\.layers\.1\.mlp\.gate\.weight is not read by MatMul"),
        (_stacked_experts_in_float, r"experts\.float is multiplied in float"),
        (_transposed_in_float, r"tied\.float is multiplied in float"),
        (_float_embedding_of_more_rows, r"wide\.float is looked up in float"),
        (_one_range_a_batch, rf"{_UP}\.int8 meets activations without a scale a token"),
        (_axis, rf"{_UP}\.int8 meets activations without a scale a token"),
        (_another_tokens_scale, rf"{_UP}\.int8 meets activations without a scale a token"),
        (_zero_points_kept, rf"{_UP}\.int8 does not take out its tokens' zero points and scales"),
        (_scales_kept, rf"{_UP}\.int8 does not take out its tokens' zero points and scales"),
        (_another_experts_place, rf"{_EXPERT}\.int8 does not have the rows of its own expert"),
        (_another_experts_rows, rf"{_EXPERT}\.int8 does not have the rows of its own expert"),
        (_one_expert_too_few, rf"{_EXPERT}\.int8 does not have the rows of its own expert"),
        (_as_many_rows_each, rf"{_EXPERT}\.int8 does not have the rows of its own expert"),
        (_zero_points_of_unsorted_rows, rf"{_EXPERT}\.int8 does not take out its tokens' zero points and scales"),
        (_zero_points_from_the_last_expert_down, rf"{_EXPERT}\.int8 does not take out its tokens' zero points and"),
        (_put_together_for_nothing, r"lm_head\.int8 does not take out its tokens' zero points and scales"),
        (_zero_points_of_one_channel, rf"{_UP}\.int8 does not take out its tokens' zero points and scales"),
        (_a_part_of_the_activations, rf"{_UP}\.int8 meets activations without a scale a token"),
        (_embedding_of_something_else, r"model\.embed_tokens\.int8 is not looked up"),
        (_one_experts_zero_points, rf"{_EXPERT}\.int8 does not take out its tokens' zero points and scales"),
        (_experts_scale_a_tensor, rf"{_EXPERT}\.int8 meets activations without a scale a token"),
    ],
)
def test_what_quantizers_do_in_silence_is_refused(
    plant: Callable[[onnx.ModelProto], None], told: str, graph: Path, model: LanguageModel
) -> None:
    planted = onnx.load(graph)
    plant(planted)
    onnx.save(planted, graph)
    with pytest.raises(Refused, match=told):
        audit(graph, model, PLAN)


def test_a_weight_that_is_turned_meets_activations_that_are(model: LanguageModel, tmp_path: Path) -> None:
    plain, path = copy.deepcopy(model), tmp_path / "model.onnx"
    onnx_model.export(turn_hidden(model, PLAN), PLAN, path)
    assert sorted(audit(path, model, PLAN).float_products) == ["model.layers.1.mlp.gate.weight", "turn_16", "turn_48"]
    with pytest.raises(Refused, match=r"turn_16 is multiplied in float.*\.int8 meets .* turn_48, not nothing"):
        audit(path, plain, PLAN)
    # A pass that takes a product for one that changes nothing, because its matrix is orthogonal.
    planted = onnx.load(path)
    makers = {name: node for node in planted.graph.node for name in node.output}
    product = _reader(planted, "turn_48")
    unturned = makers[product.input[0]].input[0]
    after = _reader(planted, product.output[0]).output[0]
    for node in planted.graph.node:
        node.input[:] = [unturned if name == after else name for name in node.input]
    onnx.save(planted, path)
    with pytest.raises(Refused, match=r"0\.mlp\.down_proj\.int8 meets activations turned by nothing, not turn_48"):
        audit(path, model, PLAN)


def _scale_a_token(planted: onnx.ModelProto) -> None:
    product = _reader(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    planted.graph.node.append(onnx.helper.make_node("Abs", [quantize.input[0]], ["by_token"]))
    quantize.input[1] = "by_token"


def _zero_point_forgotten(planted: onnx.ModelProto) -> None:
    del _reader(planted, f"{UP}.int8").input[4]


def _signed_range(planted: onnx.ModelProto) -> None:
    product = _reader(planted, f"{UP}.int8")
    quantize = next(node for node in planted.graph.node if product.input[0] in node.output)
    planted.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "signed"))
    quantize.input[2] = product.input[4] = "signed"


@pytest.mark.parametrize(
    "plant", [_scale_a_tensor, _one_constant_scale, _scale_a_token, _zero_point_forgotten, _signed_range]
)
def test_only_the_range_that_was_calibrated_is_right_for_static(
    plant: Callable[[onnx.ModelProto], None], model: LanguageModel, tmp_path: Path
) -> None:
    ids = torch.randint(0, 257, (4, 16), generator=torch.Generator().manual_seed(1))
    plan, path = calibrate(model, PLANS["static-8"], ids), tmp_path / "model.onnx"
    onnx_model.export(model, plan, path)
    found = audit(path, model, plan)
    assert found.operators[per_token.OPERATOR] == [*expected_products(model, plan).values()].count(per_token.OPERATOR)
    assert found.float_products == ["model.layers.1.mlp.gate.weight"]
    planted = onnx.load(path)
    plant(planted)
    onnx.save(planted, path)
    with pytest.raises(Refused, match=rf"{_UP}\.int8 meets activations that are not unsigned 8 bits of its calibrated"):
        audit(path, model, plan)


def test_fixed_ranges_are_a_trap_where_no_range_was_asked_for(model: LanguageModel, tmp_path: Path) -> None:
    ids = torch.randint(0, 257, (4, 16), generator=torch.Generator().manual_seed(1))
    onnx_model.export(model, calibrate(model, PLANS["static-8"], ids), tmp_path / "model.onnx")
    with pytest.raises(Refused, match=rf"{_UP}\.int8 meets activations without a scale a token"):
        audit(tmp_path / "model.onnx", model, PLAN)


@pytest.mark.parametrize(
    ("attribute", "value", "told"),
    [
        ("accuracy_level", 1, "accuracy_level 1, not 4"),
        ("block_size", 16, "block_size 16, not 32"),
        ("bits", 4, "bits 4, not 8"),
        ("K", 31, "K 31, not 32"),
    ],
)
def test_blocks_that_are_multiplied_otherwise_are_refused(
    attribute: str, value: int, told: str, model: LanguageModel, tmp_path: Path
) -> None:
    plan, path = PLANS["blockwise-8"], tmp_path / "model.onnx"
    onnx_model.export(model, plan, path)
    planted = onnx.load(path)
    product = _reader(planted, f"{UP}.int8")
    next(one for one in product.attribute if one.name == attribute).i = value
    onnx.save(planted, path)
    with pytest.raises(Refused, match=rf"{_UP}\.int8 is multiplied with {told}"):
        audit(path, model, plan)


@pytest.mark.parametrize(
    ("attribute", "value", "told"),
    [
        ("accuracy_level", 0, "accuracy_level 0, not 4"),
        ("swiglu_fusion", 2, "swiglu_fusion 2, not 1"),
        ("activation_alpha", 1.702, r"activation_alpha 1\.70\d+, not 1\.0"),
        ("normalize_routing_weights", 1, "normalize_routing_weights 1, not 0"),
        ("k", 1, "k 1, not 2"),
    ],
)
def test_experts_that_are_multiplied_otherwise_are_refused(
    attribute: str, value: float, told: str, model: LanguageModel, tmp_path: Path
) -> None:
    plan, path = PLANS["blockwise-4"], tmp_path / "model.onnx"
    onnx_model.export(model, plan, path)
    found = audit(path, model, plan)
    assert found.operators["QMoE"] == [*expected_products(model, plan).values()].count("QMoE") / 2 == 1
    planted = onnx.load(path)
    node = next(node for node in planted.graph.node if node.op_type == "QMoE")
    kept = [one for one in node.attribute if one.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])
    onnx.save(planted, path)
    with pytest.raises(Refused, match=rf"experts\.down_proj\.int4 is multiplied with {told}"):
        audit(path, model, plan)


def test_experts_that_the_routers_gates_do_not_weigh_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    plan, path = PLANS["blockwise-4"], tmp_path / "model.onnx"
    onnx_model.export(model, plan, path)
    planted = onnx.load(path)
    # The operator makes weights of its own then, of a softmax over the gates.
    del next(node for node in planted.graph.node if node.op_type == "QMoE").input[14:]
    onnx.save(planted, path)
    with pytest.raises(Refused, match=r"experts\.down_proj\.int4 is not weighed by the router's gates"):
        audit(path, model, plan)


def test_experts_that_lack_scales_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    plan, path = PLANS["blockwise-8"], tmp_path / "model.onnx"
    onnx_model.export(model, plan, path)
    planted = onnx.load(path)
    _one_scale("model.layers.1.mlp.experts.down_proj.scales")(planted)
    onnx.save(planted, path)
    with pytest.raises(Refused, match=r"mlp\.experts\.down_proj\.scales holds 1 scales, not \d+"):
        audit(path, model, plan)


def test_a_graph_of_another_scheme_is_refused(graph: Path, model: LanguageModel) -> None:
    with pytest.raises(Refused, match=rf"{_UP}\.int4 is not read by MatMulNBits"):
        audit(graph, model, PLANS["blockwise-4"])


@pytest.mark.parametrize("name", ["per-token-8", "blockwise-8", "blockwise-4"])
@pytest.mark.parametrize(
    ("pattern", "layer"),
    [
        ("*.down_proj", "model.layers.0.mlp.down_proj"),
        # Absorbed: what is multiplied are its heads.
        ("*.kv_b_proj", "model.layers.1.self_attn.kv_b_proj"),
        ("*.o_proj", "model.layers.1.self_attn.o_proj"),
        ("*.self_attn.*", "model.layers.0.self_attn.q_proj+kv_a_proj_with_mqa"),
        ("*.layers.0.*", "model.layers.0.mlp.gate_proj+up_proj"),
        ("*.experts", "model.layers.1.mlp.experts.2.down_proj"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_layer_that_is_meant_to_be_float_is_no_fault(
    name: str, pattern: str, layer: str, model: LanguageModel, tmp_path: Path
) -> None:
    plan = dataclasses.replace(PLANS[name], in_float=(pattern,))
    onnx_model.export(model, plan, tmp_path / "model.onnx")
    found = audit(tmp_path / "model.onnx", model, plan)
    assert f"{layer}.weight" in found.float_products
    with pytest.raises(Refused, match=rf"{re.escape(layer)}\.weight is multiplied in float"):
        audit(tmp_path / "model.onnx", model, PLANS[name])


@pytest.mark.parametrize("name", PLANS)
def test_routers_are_what_they_are_meant_to_be(name: str, model: LanguageModel, tmp_path: Path) -> None:
    router = "model.layers.1.mlp.gate"
    windows = torch.arange(48).view(3, 16)
    rounded, floating = (
        calibrate(model, dataclasses.replace(PLANS[name], routers=routers), windows) for routers in ("int8", "float")
    )
    onnx_model.export(model, rounded, tmp_path / "model.onnx")
    found = audit(tmp_path / "model.onnx", model, rounded)
    assert found.float_products == []
    assert f"{router}.int8" in {weight.name for weight in found.weights}
    # It is told of as of every other layer: where nobody meant it, and where it was meant and is not there.
    with pytest.raises(Refused, match=rf"{re.escape(router)}\.weight is not read by MatMul"):
        audit(tmp_path / "model.onnx", model, floating)
    onnx_model.export(model, floating, tmp_path / "model.onnx")
    with pytest.raises(Refused, match=rf"{re.escape(router)}\.weight is multiplied in float"):
        audit(tmp_path / "model.onnx", model, rounded)


def test_norms_are_what_they_are_meant_to_be(model: LanguageModel, tmp_path: Path) -> None:
    rounded = dataclasses.replace(PLAN, norms="int8")
    onnx_model.export(model, rounded, tmp_path / "model.onnx")
    found = {weight.name: weight for weight in audit(tmp_path / "model.onnx", model, rounded).weights}
    assert (found["model.norm.int8"].type, found["model.norm.scales"].shape) == ("int8", [1])
    with pytest.raises(Refused, match=r"model\.norm\.int8 weighs a norm.*model\.norm\.weight weighs no norm"):
        audit(tmp_path / "model.onnx", model, PLAN)
    # Another norm's scale.
    planted = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    (reader,) = (node for node in planted.graph.node if "model.norm.scales" in node.input)
    reader.input[1] = "model.layers.0.input_layernorm.scales"
    (tmp_path / "planted.onnx").write_bytes(planted.SerializeToString())
    with pytest.raises(Refused, match=rf"{reader.output[0]} weighs a norm; model\.norm\.int8 weighs no norm"):
        audit(tmp_path / "planted.onnx", model, rounded)
    onnx_model.export(model, PLAN, tmp_path / "model.onnx")
    with pytest.raises(Refused, match=r"model\.norm\.scales holds 0 scales, not 1.*model\.norm\.weight weighs a norm"):
        audit(tmp_path / "model.onnx", model, rounded)


def test_an_embedding_that_is_meant_to_be_float_is_no_fault(model: LanguageModel, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, in_float=("model.embed_tokens",))
    onnx_model.export(model, plan, tmp_path / "model.onnx")
    assert audit(tmp_path / "model.onnx", model, plan).bytes_by_type["float32"] > 257 * 32 * 4
    with pytest.raises(Refused, match=r"embed_tokens\.weight is looked up in float"):
        audit(tmp_path / "model.onnx", model, PLAN)
    onnx_model.export(model, PLAN, tmp_path / "model.onnx")
    with pytest.raises(Refused, match=r"embed_tokens\.weight is not looked up"):
        audit(tmp_path / "model.onnx", model, plan)


@pytest.mark.parametrize("pattern", ["*.q_proj", "*.self_attn.*", "*.layers.1.*", "*.up_proj", "lm_head"])
def test_layers_of_the_other_family_are_kept_float_as_well(pattern: str, tmp_path: Path) -> None:
    grouped = make_grouped()
    plan = dataclasses.replace(PLANS["blockwise-8"], in_float=(pattern,))
    onnx_model.export(grouped, plan, tmp_path / "model.onnx")
    assert audit(tmp_path / "model.onnx", grouped, plan).float_products
