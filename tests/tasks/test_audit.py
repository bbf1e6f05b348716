"""The audit of a quantized graph finds what was planted, and nothing else."""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import spoilt
import torch
from odd import make_grouped
from onnx import numpy_helper

from lm import hugging_face, onnx_model, per_token
from lm.calibration import calibrate
from lm.model import LanguageModel
from lm.quantization import PLANS, Plan
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


def check_that_it_is_refused(
    path: Path, model: LanguageModel, plan: Plan, plant: Callable[[onnx.ModelProto], None], told: str
) -> None:
    """Plants a fault into the graph at ``path``."""
    planted = onnx.load(path)
    plant(planted)
    onnx.save(planted, path)
    with pytest.raises(Refused, match=told):
        audit(path, model, plan)


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
    onnx.save(spoilt.float_of(graph, name), graph)
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


_UP = re.escape(spoilt.UP)


_EXPERT = re.escape(spoilt.EXPERT)
_LATENTS = r"model\.layers\.1\.self_attn\.kv_b_proj"
_OTHER_OPERANDS = "has other operands than its own scales"


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (spoilt.scale_a_tensor, rf"{_UP}\.int8 meets activations without a scale a token"),
        (spoilt.one_constant_scale, rf"{_UP}\.int8 meets activations without a scale a token"),
        (spoilt.signed_activations, rf"{_UP}\.int8 meets activations without a scale a token in unsigned 8 bits"),
        (spoilt.another_zero, rf"{_UP}\.int8 meets activations without a scale a token"),
        (spoilt.a_scale_for_all, rf"{_UP}\.int8 meets activations without a scale a token"),
        (spoilt.unsigned_weight, rf"{_UP}\.int8 is not signed, so its product runs 3 times slower"),
        (spoilt.one_scale(f"{spoilt.UP}.scales"), rf"{_UP}\.scales holds 1 scales, not 96"),
        (spoilt.one_scale("model.embed_tokens.scales"), r"model\.embed_tokens\.scales holds 1 scales, not 257"),
        (spoilt.gemm, rf"{_UP}\.float is multiplied in float.*{_UP}\.int8 is not read by MatMulIntegerToFloat"),
        (spoilt.dequantized, rf"{_UP}\.int8 is not read by MatMulIntegerToFloat"),
        (spoilt.router_in_int8, r"model\.layers\.1\.mlp\.gate\.weight is not read by MatMul"),
        (spoilt.stacked_experts_in_float, r"experts\.float is multiplied in float"),
        (spoilt.transposed_in_float, r"tied\.float is multiplied in float"),
        (spoilt.float_embedding_of_more_rows, r"wide\.float is looked up in float"),
        (spoilt.one_range_a_batch, rf"{_UP}\.int8 meets activations without a scale a token"),
        (spoilt.axis, rf"{_UP}\.int8 meets activations without a scale a token"),
        (spoilt.another_tokens_scale, rf"{_UP}\.int8 meets activations without a scale a token"),
        (spoilt.zero_points_kept, rf"{_UP}\.int8 does not take out its tokens' zero points and scales"),
        (spoilt.scales_kept, rf"{_UP}\.int8 does not take out its tokens' zero points and scales"),
        (spoilt.another_experts_place, rf"{_EXPERT}\.int8 does not have the rows of its own expert"),
        (spoilt.another_experts_rows, rf"{_EXPERT}\.int8 does not have the rows of its own expert"),
        (spoilt.one_expert_too_few, rf"{_EXPERT}\.int8 does not have the rows of its own expert"),
        (spoilt.as_many_rows_each, rf"{_EXPERT}\.int8 does not have the rows of its own expert"),
        (spoilt.zero_points_of_unsorted_rows, rf"{_EXPERT}\.int8 does not take out its tokens' zero points and scales"),
        (
            spoilt.zero_points_from_the_last_expert_down,
            rf"{_EXPERT}\.int8 does not take out its tokens' zero points and",
        ),
        (spoilt.put_together_for_nothing, r"lm_head\.int8 does not take out its tokens' zero points and scales"),
        (spoilt.zero_points_of_one_channel, rf"{_UP}\.int8 does not take out its tokens' zero points and scales"),
        (spoilt.a_part_of_the_activations, rf"{_UP}\.int8 meets activations without a scale a token"),
        (spoilt.embedding_of_something_else, r"model\.embed_tokens\.int8 is not looked up"),
        (spoilt.one_experts_zero_points, rf"{_EXPERT}\.int8 does not take out its tokens' zero points and scales"),
        (spoilt.experts_scale_a_tensor, rf"{_EXPERT}\.int8 meets activations without a scale a token"),
        (spoilt.one_scale_for_all_channels, rf"{_UP}\.int8 {_OTHER_OPERANDS}"),
        (spoilt.another_experts_scales, rf"{_EXPERT}\.int8 {_OTHER_OPERANDS}"),
        (spoilt.weights_zero_point, rf"{_UP}\.int8 {_OTHER_OPERANDS}"),
        (spoilt.embedding_a_scale_for_all, r"model\.embed_tokens\.int8 is not scaled row by row"),
        (spoilt.embedding_without_its_scales, r"model\.embed_tokens\.int8 is not scaled row by row"),
        (spoilt.embedding_the_first_rows_scale, r"model\.embed_tokens\.int8 is not scaled row by row"),
        (spoilt.latents_in_float, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
        (spoilt.latents_without_a_zero_point, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
        (spoilt.latents_of_no_token, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
        (spoilt.cache_of_no_token, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
        (spoilt.latents_rounded_within_another_range, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
        (spoilt.expansion_without_its_scales, rf"{_LATENTS}\.int8 is multiplied by other scales than its own"),
    ],
)
def test_what_quantizers_do_in_silence_is_refused(
    plant: Callable[[onnx.ModelProto], None], told: str, graph: Path, model: LanguageModel
) -> None:
    check_that_it_is_refused(graph, model, PLAN, plant, told)


def test_a_weight_that_is_turned_meets_activations_that_are(model: LanguageModel, tmp_path: Path) -> None:
    plain, path = copy.deepcopy(model), tmp_path / "model.onnx"
    onnx_model.export(turn_hidden(model, PLAN), PLAN, path)
    assert sorted(audit(path, model, PLAN).float_products) == ["model.layers.1.mlp.gate.weight", "turn_16", "turn_48"]
    with pytest.raises(Refused, match=r"turn_16 is multiplied in float.*\.int8 meets .* turn_48, not nothing"):
        audit(path, plain, PLAN)
    # A pass that takes a product for one that changes nothing, because its matrix is orthogonal.
    planted = onnx.load(path)
    makers = {name: node for node in planted.graph.node for name in node.output}
    product = spoilt.reader_of(planted, "turn_48")
    unturned = makers[product.input[0]].input[0]
    after = spoilt.reader_of(planted, product.output[0]).output[0]
    for node in planted.graph.node:
        node.input[:] = [unturned if name == after else name for name in node.input]
    onnx.save(planted, path)
    with pytest.raises(Refused, match=r"0\.mlp\.down_proj\.int8 meets activations turned by nothing, not turn_48"):
        audit(path, model, PLAN)


@pytest.mark.parametrize(
    "plant",
    [
        spoilt.scale_a_tensor,
        spoilt.one_constant_scale,
        spoilt.scale_a_token,
        spoilt.zero_point_forgotten,
        spoilt.signed_range,
    ],
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
    check_that_it_is_refused(
        path, model, plan, plant, rf"{_UP}\.int8 meets activations that are not unsigned 8 bits of its calibrated"
    )


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (spoilt.one_scale_for_all_channels, rf"{_UP}\.int8 {_OTHER_OPERANDS}"),
        (spoilt.latents_in_float, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
        (spoilt.latents_without_a_zero_point, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
        (spoilt.latents_rounded_within_another_range, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
    ],
)
def test_static_has_its_own_scales_and_the_range_of_its_latents(
    plant: Callable[[onnx.ModelProto], None], told: str, model: LanguageModel, tmp_path: Path
) -> None:
    plan, path = calibrate(model, PLANS["static-8"], torch.arange(48).view(3, 16)), tmp_path / "model.onnx"
    onnx_model.export(model, plan, path)
    check_that_it_is_refused(path, model, plan, plant, told)


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
    product = spoilt.reader_of(planted, f"{spoilt.UP}.int8")
    next(one for one in product.attribute if one.name == attribute).i = value
    onnx.save(planted, path)
    with pytest.raises(Refused, match=rf"{_UP}\.int8 is multiplied with {told}"):
        audit(path, model, plan)


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (spoilt.one_scale_for_all_channels, rf"{_UP}\.int8 {_OTHER_OPERANDS}"),
        (spoilt.zero_points_of_blocks, rf"{_UP}\.int8 {_OTHER_OPERANDS}"),
        (spoilt.bias_of_blocks, rf"{_UP}\.int8 {_OTHER_OPERANDS}"),
        (spoilt.bias_of_experts, rf"experts\.gate_up_proj\.int8 {_OTHER_OPERANDS}"),
        (spoilt.scales_of_experts, rf"experts\.down_proj\.int8 {_OTHER_OPERANDS}"),
        (spoilt.latents_in_float, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
        (spoilt.latents_of_no_token, rf"{_LATENTS}\.int8 meets latents that are not rounded"),
        (spoilt.expansion_without_its_scales, rf"{_LATENTS}\.int8 is multiplied by other scales than its own"),
    ],
)
def test_what_is_added_to_blocks_in_silence_is_refused(
    plant: Callable[[onnx.ModelProto], None], told: str, model: LanguageModel, tmp_path: Path
) -> None:
    plan, path = PLANS["blockwise-8"], tmp_path / "model.onnx"
    onnx_model.export(model, plan, path)
    check_that_it_is_refused(path, model, plan, plant, told)


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
    plant = spoilt.one_scale("model.layers.1.mlp.experts.down_proj.scales")
    check_that_it_is_refused(path, model, plan, plant, r"mlp\.experts\.down_proj\.scales holds 1 scales, not \d+")


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
