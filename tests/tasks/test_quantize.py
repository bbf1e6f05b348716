"""Quantization: the audit finds what was planted, and the stage resumes like training does."""

import copy
import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import onnx
import pytest
import tiny
import torch
from odd import make_model, write_checkpoint
from onnx import numpy_helper

from lm import blockwise, hugging_face, onnx_model, per_token
from lm.calibration import calibrate
from lm.model import LanguageModel
from lm.quantization import PLANS, prepare
from lm.rotation import turn_hidden
from tasks.errors import EXIT_TRY_AGAIN, Refused
from tasks.quantize.audit import audit, expected_products
from tasks.quantize.params import QuantizeParams
from tasks.quantize.schemes import Measure
from tasks.section import read_section
from tasks.shards import WindowReader
from tasks.world import World

PLAN = PLANS["per-token-8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny.write_params(folder)
    tiny.write_shards(folder)
    code, output = tiny.run("train", folder)
    assert code == 0, output
    return folder


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
    assert found.quantized_products == len(expected)
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


def test_blocks_that_are_multiplied_at_another_level_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    plan, path = PLANS["blockwise-8"], tmp_path / "model.onnx"
    onnx_model.export(model, plan, path)
    planted = onnx.load(path)
    product = _reader(planted, f"{UP}.int8")
    next(one for one in product.attribute if one.name == "accuracy_level").i = 1
    onnx.save(planted, path)
    with pytest.raises(Refused, match=rf"{_UP}\.int8 is multiplied at accuracy level 1, not 4"):
        audit(path, model, plan)


@pytest.mark.parametrize(
    ("attribute", "value", "told"),
    [
        ("accuracy_level", 0, "accuracy_level 0, not 4"),
        ("swiglu_fusion", 2, "swiglu_fusion 2, not 1"),
        ("activation_alpha", 1.702, r"activation_alpha 1\.70\d+, not 1\.0"),
        ("normalize_routing_weights", 1, "normalize_routing_weights 1, not 0"),
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


def test_a_layer_that_is_meant_to_be_float_is_no_fault(model: LanguageModel, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLANS["blockwise-8"], in_float=("*.down_proj",))
    onnx_model.export(model, plan, tmp_path / "model.onnx")
    found = audit(tmp_path / "model.onnx", model, plan)
    assert "model.layers.0.mlp.down_proj.weight" in found.float_products
    with pytest.raises(Refused, match=r"mlp\.down_proj\.weight is multiplied in float"):
        audit(tmp_path / "model.onnx", model, PLANS["blockwise-8"])


def test_fine_tuning_towards_the_float_model_stays_with_it(trained: Path) -> None:
    divergences = {}
    for objective in ("text", "float"):
        tiny.write_params(
            trained,
            quantize__scheme="weight-only-4",
            quantize__objective=objective,
            quantize__learning_rate=1e-3,
            quantize__steps=20,
            quantize__world_size=1,
        )
        code, output = tiny.run("quantize", trained)
        assert code == 0, output
        found = json.loads((trained / "models/int8/quantization.json").read_text())
        assert found["objective"] == objective
        divergences[objective] = found["trials"][-1]["kl_divergence"]["value"]
    # Twelve steps have taught the model little, and 20 on the text teach it more.
    assert 0 < divergences["float"] < 0.01 * divergences["text"]


@pytest.mark.parametrize(
    ("asked", "limit", "kept", "tried"),
    [
        ("dynamic", 1.0, "dynamic", ["dynamic post-training"]),
        ("static", 1.0, "static", ["static post-training"]),
        ("weight-only-4", 1.0, "weight-only-4", ["weight-only-4 post-training", "weight-only-4 fine-tuning"]),
        ("auto", 1.0, "weight-only-8", ["weight-only-8 post-training"]),
    ],
)
def test_each_scheme_makes_its_graph_and_auto_keeps_the_first_that_loses_little(
    trained: Path, asked: str, limit: float, kept: str, tried: list[str]
) -> None:
    tiny.write_params(
        trained,
        quantize__scheme=asked,
        quantize__max_relative_loss=limit,
        quantize__learning_rate=1e-9,
        quantize__world_size=1,
    )
    code, output = tiny.run("quantize", trained)
    assert code == 0, output
    found = json.loads((trained / "models/int8/quantization.json").read_text())
    assert (found["asked"], found["scheme"]) == (asked, kept)
    assert [f"{trial['scheme']} {trial['after']}" for trial in found["trials"]] == tried
    losses = {trial["scheme"]: trial["relative_loss"] for trial in found["trials"]}
    assert all(loss["low"] <= loss["value"] <= loss["high"] for loss in losses.values())
    # So small a rate changes nothing, so the roundings' own cost shows.
    assert 0 < max(abs(loss["value"]) for loss in losses.values()) < 0.05
    divergences = {trial["scheme"]: trial["kl_divergence"] for trial in found["trials"]}
    assert all(one["low"] <= one["value"] <= one["high"] < 0.1 for one in divergences.values()), divergences
    assert asked != "weight-only-4" or divergences[kept]["low"] > 0
    operators = json.loads((trained / "models/int8/audit.json").read_text())["operators"]
    assert ("MatMulNBits" in operators) == kept.startswith("weight-only")
    assert ("model.layers.1.mlp.experts.down_proj" in found["ranges"]) == (kept == "static")


@pytest.mark.parametrize(
    ("rate", "objective", "recomputed", "kept"),
    [
        (1e-3, "text", "none", "qat"),
        (3.0, "text", "none", "weight-only-8"),
        # What they change in a model has it in circles.
        (3.0, "float", "full", "weight-only-8"),
    ],
)
def test_where_none_loses_little_enough_auto_keeps_what_loses_least(
    trained: Path, rate: float, objective: str, recomputed: str, kept: str
) -> None:
    settings = {
        "quantize__learning_rate": rate,
        "quantize__objective": objective,
        "quantize__activation_checkpointing": recomputed,
        "quantize__world_size": 1,
    }
    tiny.write_params(trained, quantize__scheme="auto", quantize__max_relative_loss=-1.0, **settings)
    counts = trained / "counts"
    counts.unlink(missing_ok=True)
    code, output = tiny.run("quantize", trained, forked.count_models, COUNTS=str(counts))
    assert code == 0, output
    # What was tried before is gone when the next one is made: beside that there is the float model alone.
    assert counts.read_text().split() == ["0", *["1"] * (2 if kept == "qat" else 3)]
    found = json.loads((trained / "models/int8/quantization.json").read_text())
    tried = [f"{trial['scheme']} {trial['after']}" for trial in found["trials"]]
    assert tried == ["weight-only-8 post-training", "qat post-training", "qat fine-tuning"]
    first, _, last = (trial["relative_loss"]["value"] for trial in found["trials"])
    assert (found["scheme"], found["fine_tuned"]) == (kept, kept == "qat")
    assert (last < first) == (kept == "qat")
    graph = (trained / "models/int8/model.onnx.data").read_bytes()
    tiny.write_params(trained, quantize__scheme=kept, quantize__max_relative_loss=-1.0, **settings)
    assert tiny.run("quantize", trained)[0] == 0
    assert (trained / "models/int8/model.onnx.data").read_bytes() == graph


class _Alone(World):
    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


# All of a window's logits at once, or those of seven tokens, or of one.
@pytest.mark.parametrize("held", [2**26, 7 * 101, 1])
@pytest.mark.parametrize("answers", [False, True])
@torch.no_grad()
def test_a_trial_is_what_a_plain_loop_over_windows_says(
    held: int, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.loss.LOGITS_HELD", held)
    tokens = np.random.default_rng(0).integers(0, 100, 400).astype(np.uint16)
    # Of conversations the answers count; some windows have none.
    mask = (np.random.default_rng(1).random(400) < 0.3).astype(np.uint8) if answers else np.ones(400, np.uint8)
    mask[:61] = not answers
    windows = WindowReader([tokens], 20, [mask] if answers else [])
    params = read_section("quantize", QuantizeParams, Path(tiny.ROOT / "params.yaml"))
    params = params.model_copy(update={"validation_windows": 100})
    measure = Measure(make_model(), windows, params, _Alone(0, 1, torch.device("cpu"), "fp32"))
    model, sizes = prepare(make_model(), PLAN), set[int]()
    model.lm_head.register_forward_hook(lambda _, __, logits: sizes.add(logits.numel()))
    trial = measure.trial("dynamic", "post-training", model)
    assert max(sizes) == min(max(held // 101, 1), 20) * 101
    floating, rounded = make_model(), prepare(make_model(), PLAN).eval()
    losses, divergence = np.zeros(2), 0.0
    for index, window in enumerate(torch.from_numpy(windows.batch(np.arange(len(windows)))).long()):
        counted = torch.from_numpy(mask[20 * index + 1 : 20 * index + 21])
        theirs, ours = (model(window[None, :-1])[0].log_softmax(-1) for model in (floating, rounded))
        losses += [-float((one[range(20), window[1:]] * counted).sum()) for one in (ours, theirs)]
        divergence += float(((theirs.exp() * (theirs - ours)).sum(-1) * counted).sum())
    assert len(windows) == 19
    assert measure.count == (16 if answers else 19)
    assert trial.relative_loss.value == pytest.approx(losses[0] / losses[1] - 1, abs=2e-6)
    assert trial.kl_divergence.value == pytest.approx(divergence / mask[1:381].sum(), abs=2e-6)
    assert 1e-4 < trial.kl_divergence.low < trial.kl_divergence.value < trial.kl_divergence.high


# Compensation after rotation is all there is, so it is done twice.
@pytest.mark.parametrize(
    ("scheme", "rotated", "compensated", "times"),
    [
        ("weight-only-8", False, False, 1),
        ("weight-only-8", True, False, 1),
        ("weight-only-8", True, True, 2),
        ("dynamic", True, True, 2),
    ],
)
def test_what_is_done_before_the_rounding_is_asked_for_told_and_always_the_same(
    trained: Path, scheme: str, rotated: bool, compensated: bool, times: int
) -> None:
    tiny.write_params(
        trained,
        **tiny.ALONE,
        quantize__scheme=scheme,
        quantize__rotate=rotated,
        quantize__compensate=compensated,
        quantize__calibration_windows=4,
    )
    made = []
    for _ in range(times):
        code, output = tiny.run("quantize", trained)
        assert code == 0, output
        made.append(tiny.files_of(trained / "models/int8"))
    assert made[0] == made[-1]
    found = json.loads(made[0]["quantization.json"])
    assert (found["rotated"], found["compensated"], found["fine_tuned"]) == (rotated, compensated, False)
    graph = onnx.load(trained / "models/int8/model.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    # A turned model's norms have no weights of their own; a weight that is only rounded is that of the float model.
    assert (stored["model.layers.0.input_layernorm.weight"] == 1).all() == rotated
    # What shares a scale over all inputs is turned while the model runs, too.
    assert ("turn_48" in stored) == (rotated and scheme == "dynamic")
    if scheme == "weight-only-8":
        name = "model.layers.0.mlp.down_proj"
        weight = hugging_face.load(trained / "models/float").model.layers[0].mlp.down_proj.weight
        integers, _ = blockwise.quantize_weight(weight.detach(), 8)
        same = (stored[f"{name}.int8"] == integers.numpy() + 128).all()
        assert same == (not rotated and not compensated)


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["*.o_prj"], "no layer's name matches '*.o_prj'. Names are model.layers.0.self_attn."),
        (["*"], "leaves no layer to quantize"),
    ],
)
def test_layers_that_cannot_stay_float_are_told_before_anything_is_trained(
    trained: Path, patterns: list[str], told: str
) -> None:
    tiny.write_params(trained, quantize__in_float=patterns)
    code, output = tiny.run("quantize", trained)
    assert code == 2
    assert f"error: params.yaml: quantize.in_float{':' if 'matches' in told else ''} {told}" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (tiny.LLAMA, ["A Qwen3-style language model of"]),
        (tiny.QWEN3_MOE, ["A Qwen3-MoE-style language model of", "| busiest expert's tokens over the mean's | "]),
    ],
    ids=["dense", "experts"],
)
def test_families_with_grouped_queries_go_through_all_stages_of_the_model(
    model: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    tiny.write_params(tmp_path, **tiny.ALONE, train__model=model, quantize__scheme="weight-only-8")
    tiny.write_shards(tmp_path)
    tiny.write_champion(tmp_path)
    for stage in ("train", "quantize", "evaluate", "card"):
        code, output = tiny.run(stage, tmp_path)
        assert code == 0, output
    evaluation = json.loads((tmp_path / "models/evaluation.json").read_text())
    assert abs(evaluation["gate"]["relative_loss"]["value"]) < 0.01
    card = (tmp_path / "models/card/README.md").read_text()
    assert all(words in card for words in told)
    assert "| cache a token and layer (numbers) | 64 |" in card
    assert "| scheme (`quantize.scheme`) | `weight-only-8` (asked: `weight-only-8`) |" in card


def test_while_the_last_checkpoint_is_written_nobody_is_taken_for_gone(tmp_path: Path) -> None:
    tiny.write_params(
        tmp_path,
        quantize__scheme="qat",
        quantize__rotate=False,
        quantize__compensate=False,
        quantize__hang_timeout_seconds=4.0,
    )
    tiny.write_shards(tmp_path)
    write_checkpoint(tmp_path / "models/float", make_model)
    code, output = tiny.run("quantize", tmp_path, forked.stall_a_checkpoint, STALLS="4")
    assert code == EXIT_TRY_AGAIN, output
    # The second process has nothing to write, and would be killed if it did not beat any more.
    told = tiny.error_line(output)
    assert told.startswith("no process came through the checkpoint of step 4: the network between them, or a disk, "), (
        told
    )


def test_a_killed_quantization_goes_on_to_the_same_bytes(trained: Path) -> None:
    tiny.write_params(trained)
    # As a model has it that was taught to converse.
    (trained / "models/float/chat_template.jinja").write_text(tiny.CHATML)
    code, output = tiny.run("quantize", trained)
    assert code == 0, output
    expected = tiny.files_of(trained / "models/int8")
    assert expected["chat_template.jinja"] == tiny.CHATML.encode()
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json", "audit.json"} <= expected.keys()
    report = json.loads(expected["audit.json"])
    assert report["quantized_share_of_bytes"] > 0.5

    for path in trained.glob(".overnight/checkpoints/quantize/*/*"):
        path.unlink()
    process = tiny.stage("quantize", trained)
    deadline = time.monotonic() + 120
    while not list(trained.glob(".overnight/checkpoints/quantize/*/*.pt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert tiny.run("quantize", trained)[0] == 0
    assert tiny.files_of(trained / "models/int8") == expected
