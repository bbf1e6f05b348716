"""The graph against its twin in floating point, for each scheme."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphs import CALIBRATION, opened
from odd import make_gated_mixture, make_grouped, make_grouped_mixture, make_model

from lm import blockwise, onnx_model, per_token
from lm.blockwise import Blockwise
from lm.calibration import calibrate
from lm.config import GroupedShape, LatentConfig
from lm.feed_forward import gated
from lm.graph import FLOAT, INT64, Graph
from lm.model import LanguageModel
from lm.per_token import PerToken
from lm.planned_graph import PlannedGraph
from lm.quantization import PLANS, Plan, prepare
from lm.rotation import rotate, turn_hidden
from lm.scheme import Float, Rows, Scheme, Sorted
from lm.static import Range, Static

if TYPE_CHECKING:
    from conftest import Exported

EIGHT = PLANS["per-token-8"]
SCHEMES = {
    "per token": PerToken(),
    "blocks of 8 bits": Blockwise(8, 32),
    "wide blocks of 8 bits": Blockwise(8, 64),
    "blocks of 4 bits": Blockwise(4, 32),
    # Most of what the test multiplies lies within, and some beyond either end.
    "fixed ranges": Static(Range.over(-40.0, 900.0)),
    "float": Float(),
}


@pytest.fixture(params=PLANS.values(), ids=PLANS.keys())
def plan(request: pytest.FixtureRequest) -> Plan:
    found: Plan = request.param
    return found


def _session(model: LanguageModel, folder: Path, plan: Plan = EIGHT) -> onnxruntime.InferenceSession:
    onnx_model.export(model, plan, folder / "model.onnx")
    return opened(folder / "model.onnx")


Caches = dict[str, np.ndarray]


def _run(
    session: onnxruntime.InferenceSession,
    ids: torch.Tensor,
    past: Caches | None = None,
    start: int = 0,
    capacity: int = 40,
) -> tuple[np.ndarray, Caches]:
    """Plain runs, that bind nothing: each returns new caches, with room for ``capacity`` tokens."""
    sizes = {"batch": len(ids), "capacity": capacity}
    shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_")}
    if past is None:
        past = {name: np.zeros([sizes.get(axis, axis) for axis in shape], np.float32) for name, shape in shapes.items()}
    length = ids.shape[1]
    every = np.broadcast_to(np.arange(length), ids.shape)
    feed = {"input_ids": ids.numpy(), "positions": every + start, "logits_to_keep": every, **past}
    outputs = [value.name for value in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, feed), strict=True))
    return found.pop("logits"), {name.replace("present_", "past_"): cache for name, cache in found.items()}


def _run_step_by_step(session: onnxruntime.InferenceSession, ids: torch.Tensor) -> tuple[np.ndarray, Caches]:
    steps, past = [], None
    for position in range(ids.shape[1]):
        logits, past = _run(session, ids[:, position : position + 1], past, position)
        steps.append(logits)
    assert past is not None
    return np.concatenate(steps, axis=1), past


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (33, 129)])
def test_a_product_is_that_of_fake_quantization(scheme: Scheme, shape: tuple[int, int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    # Tokens of very different sizes, one all zero, one all positive: each has its own scale and zero point.
    x = torch.randn(shape, generator=generator) * torch.logspace(-4, 4, shape[0]).unsqueeze(1)
    x[0] = 0.0
    x[-1] = x[-1].abs() + 1
    weight = torch.randn(24, shape[1], generator=generator)
    graph = Graph("product")
    rows = Rows(graph, graph.input("x", FLOAT, ["tokens", shape[1]]))
    graph.output(scheme.lower(graph, "w", weight, rows.operand(scheme)), "y", FLOAT, ["tokens", 24])
    graph.save(tmp_path / "product.onnx")
    computed = torch.from_numpy(opened(tmp_path / "product.onnx").run(None, {"x": x.numpy()})[0])
    expected = scheme.project(x, weight)
    size = expected.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    assert ((computed - expected) / size).abs().max() < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_ranges_are_taken_in_fp32_whatever_is_multiplied(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(size, 48, generator=generator).bfloat16() for size in (9, 24))
    assert torch.equal(scheme.project(x.float(), weight.float()).to(x.dtype), scheme.project(x, weight).to(x.dtype))


def test_the_graph_computes_what_fake_quantization_learned(exported: "Exported", ids: torch.Tensor) -> None:
    with torch.no_grad():
        expected_float = exported.model(ids).numpy()
        expected = prepare(copy.deepcopy(exported.model), exported.plan)(ids).numpy()
    computed, _ = _run(exported.session, ids)
    error = np.abs(computed - expected).max(axis=-1).flatten()
    # Two orders of summation differ in the seventh digit; where that tips a value over a rounding boundary, all later
    # tokens differ by one level of one value. The tokens before are equal to the last digits.
    assert np.quantile(error, 0.25) < 2e-5
    assert np.abs(computed - expected).mean() < 0.5 * np.abs(expected_float - expected).mean()


# Where nothing is rounded but the embedding, no value tips over a boundary, and all of a graph can be held to its twin.
UNROUNDED = Plan(Float(), Float())


@torch.no_grad()
def test_where_nothing_is_rounded_every_number_of_the_graph_is_its_twins(
    model: LanguageModel, ids: torch.Tensor, tmp_path: Path
) -> None:
    expected = prepare(copy.deepcopy(model), UNROUNDED)(ids).numpy()
    leeway = 1e-5 * np.abs(expected).max()
    # Nothing but the embedding is rounded, and not even that where it is named.
    kept = Plan(Float(), Float(), ("model.embed_tokens",))
    floating = model(ids).numpy()
    computed, _ = _run(_session(model, tmp_path, kept), ids)
    assert np.abs(computed - floating).max() < leeway < np.abs(expected - floating).max()
    session = _session(model, tmp_path, UNROUNDED)
    # With spare room latents are absorbed, without it expanded.
    for capacity in (40, ids.shape[1]):
        computed, _ = _run(session, ids, capacity=capacity)
        assert np.abs(computed - expected).max() < leeway
    whole, cache = _run(session, ids)
    stepped, past = _run_step_by_step(session, ids)
    assert np.abs(stepped - whole).max() < leeway
    for name, one in past.items():
        np.testing.assert_allclose(one, cache[name], atol=1e-5 * np.abs(cache[name]).max(), rtol=0)
    # Beside others, alone, and shorter: the same.
    for row, length in ((0, ids.shape[1]), (0, 9), (1, 1)):
        alone, _ = _run(session, ids[row : row + 1, :length])
        assert np.abs(alone[0] - whole[row, :length]).max() < leeway


SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 6, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2, "v_head_dim": 5, "intermediate_size": 12, "moe_intermediate_size": 6,
}  # fmt: skip
SMALL_GROUPED = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (make_model, SMALL),
        (make_model, {**SMALL, "hidden_size": 64}),
        (make_model, {**SMALL, "model_type": "deepseek_v2", "norm_topk_prob": False, "q_lora_rank": 8}),
        (make_grouped, SMALL_GROUPED),
        (make_grouped, {**SMALL_GROUPED, "model_type": "qwen2", "tie_word_embeddings": True}),
        (make_grouped, {**SMALL_GROUPED, "model_type": "qwen3"}),
        (make_grouped_mixture, {**SMALL_GROUPED, "moe_intermediate_size": 6}),
        (make_grouped_mixture, {**SMALL_GROUPED, "moe_intermediate_size": 6, "hidden_size": 64}),
        (make_gated_mixture, {**SMALL_GROUPED, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 12}),
    ],
    ids=[
        *("latent, a node an expert", "latent, a node for all experts", "v2, query latent"),
        *("llama", "qwen2, tied", "qwen3"),
        *("qwen3_moe, a node an expert", "qwen3_moe, a node for all experts", "qwen2_moe"),
    ],
)
def test_where_no_value_tips_the_whole_graph_is_equal_to_five_digits(
    make: Callable[..., LanguageModel], sizes: dict[str, Any], plan: Plan, tmp_path: Path
) -> None:
    model = make(**sizes)
    # So few values that hardly ever one lies on a boundary.
    texts = torch.tensor([[3, 77, 12], [5, 41, 90], [66, 8, 30], [9, 99, 54], [71, 2, 18]])
    plan = calibrate(model, plan, texts)
    session = _session(model, tmp_path, plan)
    with torch.no_grad():
        floating = model(texts).numpy()
        expected = prepare(model, plan)(texts).numpy()
    # With spare room latents are read as they are, absorbed; without it the prompt's keys and values are expanded.
    for capacity in (40, texts.shape[1]):
        computed = np.concatenate([_run(session, ids[None], capacity=capacity)[0] for ids in texts])
        assert _but_for_one_text(computed, expected) < 1e-5
    stepped = np.concatenate([_run_step_by_step(session, ids[None])[0] for ids in texts])
    assert _but_for_one_text(stepped, expected) < 1e-5
    together, _ = _run(session, texts)
    assert _but_for_one_text(together, expected) < 1e-5
    assert np.abs(floating - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["per-token-8", "static-8", "blockwise-8-wide"])
@pytest.mark.parametrize("make", [make_model, make_grouped])
@torch.no_grad()
def test_what_is_turned_while_the_model_runs_is_turned_in_the_graph(
    make: type[LanguageModel], scheme: str, tmp_path: Path
) -> None:
    # Several turns side by side in the layers, one in each expert.
    model = rotate(make(intermediate_size=260, num_hidden_layers=2))
    ids = torch.tensor([[3, 77, 12]])
    turn_hidden(model, PLANS[scheme])
    plan = calibrate(model, PLANS[scheme], ids)
    session = _session(model, tmp_path, plan)
    floating = model(ids).numpy()
    expected = prepare(model, plan)(ids).numpy()
    computed, _ = _run(session, ids)
    error = np.abs(computed - expected).max(axis=-1).flatten()
    assert np.quantile(error, 0.25) < 1e-5 * np.abs(expected).max()
    assert np.abs(computed - expected).mean() < 0.5 * np.abs(floating - expected).mean()


def test_a_layer_that_is_named_stays_float(model: LanguageModel, ids: torch.Tensor, tmp_path: Path) -> None:
    plan = Plan(PerToken(), PerToken(), ("*.down_proj", "*.q_proj", "*.experts", "*.kv_b_proj", "*.embed_tokens"))
    computed, _ = _run(_session(model, tmp_path, plan), ids)
    with torch.no_grad():
        all_quantized = prepare(model, EIGHT)(ids).numpy()
        expected = prepare(model, plan)(ids).numpy()
    error = np.abs(computed - expected).max(axis=-1).flatten()
    assert np.quantile(error, 0.25) < 2e-5
    assert np.abs(all_quantized - expected).mean() > 10 * np.quantile(error, 0.25)


@pytest.mark.parametrize("make", [make_model, make_grouped_mixture, make_gated_mixture])
@torch.no_grad()
def test_routers_are_rounded_where_they_are_to_be(
    make: Callable[[], LanguageModel], ids: torch.Tensor, plan: Plan, tmp_path: Path
) -> None:
    rounded = dataclasses.replace(plan, routers="int8")
    for router in ("gate", "shared_expert_gate"):
        assert rounded.of(f"model.layers.1.mlp.{router}") is plan.head
        assert plan.of(f"model.layers.1.mlp.{router}") == Float()
    assert dataclasses.replace(rounded, in_float=("*.gate",)).of("model.layers.1.mlp.gate") == Float()
    rounded = calibrate(make(), rounded, CALIBRATION)
    session = _session(make(), tmp_path, rounded)
    computed, _ = _run(session, ids)
    expected, apart = (
        prepare(make(), one)(ids).numpy() for one in (rounded, dataclasses.replace(rounded, routers="float"))
    )
    error = np.abs(computed - expected).max(axis=-1).flatten()
    assert np.quantile(error, 0.25) < 2e-5
    assert np.abs(apart - expected).mean() > 10 * np.quantile(error, 0.25)


@pytest.mark.parametrize("make", [make_model, make_grouped, make_grouped_mixture])
@torch.no_grad()
def test_norms_are_rounded_where_they_are_to_be(
    make: Callable[..., LanguageModel], ids: torch.Tensor, tmp_path: Path
) -> None:
    model = make(**({"q_lora_rank": 24} if make is make_model else {}))
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(torch.linspace(-0.7, 1.3, len(weight)).cos())
    # Nothing else is, so that every number has to agree.
    rounded = Plan(Float(), Float(), ("model.embed_tokens",), norms="int8")
    session = _session(model, tmp_path, rounded)
    floating = model(ids).numpy()
    expected = prepare(model, rounded)(ids).numpy()
    for computed, _ in (_run(session, ids), _run_step_by_step(session, ids)):
        assert np.abs(computed - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(floating - expected).max() > 1e-3 * np.abs(expected).max()
    stored = {one.name for one in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer}
    assert {"model.norm.int8", "model.norm.scales"} <= stored
    assert not any("norm.weight" in name for name in stored)


def test_a_tokens_logits_do_not_depend_on_its_batch(exported: "Exported", ids: torch.Tensor) -> None:
    session = exported.session
    together, _ = _run(session, torch.cat([ids, 100 * torch.ones_like(ids[:1])]))
    alone, _ = _run(session, ids[:1])
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)
    # Another length may take latents another way: equal but for a value that tips over a rounding boundary.
    shorter, _ = _run(session, ids[:1, :9])
    assert np.median(np.abs(shorter[0] - together[0, :9]).max(axis=-1)) < 1e-5


def test_decoding_token_by_token_continues_the_prefill(exported: "Exported", ids: torch.Tensor) -> None:
    whole, cache = _run(exported.session, ids)
    stepped, past = _run_step_by_step(exported.session, ids)
    error = np.abs(stepped - whole).max(axis=-1)
    # After a value that tips over a boundary all later tokens differ, on one kind of machine here, on another there.
    assert np.quantile(error, 0.25) < 1e-5
    for name, one in past.items():
        assert one.shape == cache[name].shape
        assert np.median(np.abs(one - cache[name])) < 1e-5


def test_latent_attention_takes_the_order_with_fewer_products(tmp_path: Path) -> None:
    model = make_model(kv_lora_rank=40, first_k_dense_replace=3)
    onnx_model.export(model, EIGHT, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    layers = [node for node in graph.graph.node if node.op_type == "If"]
    assert len(layers) == len(model.model.layers)
    for layer in layers:
        branches = {one.name: {node.op_type for node in one.g.node} for one in layer.attribute}
        assert "Expand" in branches["then_branch"]
        assert "Expand" not in branches["else_branch"]
    (condition,) = {layer.input[0] for layer in layers}
    graph.graph.output.append(onnx.helper.make_tensor_value_info(condition, onnx.TensorProto.BOOL, [1]))
    onnx.save(graph, tmp_path / "tells.onnx")
    session, config = opened(tmp_path / "tells.onnx"), model.config
    assert isinstance(config, LatentConfig)
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    widths = config.qk_nope_head_dim + config.v_head_dim
    taken = []
    for length, capacity in ((1, 1), (1, 3), (1, 40), (2, 40), (11, 40), (16, 80), (16, 1000), (33, 1000)):
        _, found = _run(session, torch.zeros(1, length, dtype=torch.long), capacity=capacity)
        # Of a head: scores and sums over pairs of tokens, and what is brought into the latents' space or out of it.
        pairs = length * capacity
        expanded = pairs * (widths + rope) + capacity * rank * widths
        absorbed = pairs * (2 * rank + rope) + length * rank * widths
        taken.append(bool(found[condition].item()))
        assert taken[-1] == (expanded <= absorbed), (length, capacity)
    assert set(taken) == {True, False}


def test_what_computes_a_cache_writes_it_where_the_caller_wants_it(exported: "Exported") -> None:
    graph, model = onnx.load(exported.path, load_external_data=False).graph, exported.model
    makers = {name: node for node in graph.node for name in node.output}
    caches = [value.name for value in graph.output if value.name.startswith("present_")]
    assert len(caches) == len(model.model.layers) * (2 if isinstance(model.config, GroupedShape) else 1)
    for cache in caches:
        # One that a further node hands on would be copied whole for each token.
        assert makers[cache].op_type in ("ScatterND", "GroupQueryAttention")
        assert cache.replace("present_", "past_") in makers[cache].input


def test_exporting_twice_gives_the_same_bytes(exported: "Exported", tmp_path: Path) -> None:
    onnx_model.export(exported.model, exported.plan, tmp_path / "model.onnx")
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / file).read_bytes() == (exported.path.parent / file).read_bytes()


def _but_for_one_text(computed: np.ndarray, expected: np.ndarray) -> float:
    """Returns how far [texts, tokens, vocabulary] are apart, relative to each text's largest; the furthest may tip."""
    apart = np.abs(computed - expected).max(axis=(1, 2)) / np.abs(expected).max(axis=(1, 2))
    return float(np.sort(apart)[-2])


@pytest.mark.parametrize("plan", [EIGHT, PLANS["blockwise-8"]], ids=["per-token-8", "blockwise-8"])
def test_an_expert_without_tokens_does_no_harm(
    ids: torch.Tensor, tmp_path: Path, model: LanguageModel, plan: Plan
) -> None:
    # One token has too few to choose all of them.
    for router in model.routers():
        assert router.config.num_experts_per_tok < len(router.weight)
    logits, _ = _run(_session(model, tmp_path, plan), ids[:1, :1])
    expected = prepare(copy.deepcopy(model), plan)(ids[:1, :1]).detach().numpy()
    floating = model(ids[:1, :1]).detach().numpy()
    assert np.abs(logits - expected).mean() < 0.2 * np.abs(floating - expected).mean()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("owners", [[2], [0, 0, 0, 2, 3, 3], [1] * 5], ids=str)
def test_rows_are_each_multiplied_by_their_own_expert(owners: list[int], scheme: Scheme, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    count, numbers = 4, torch.tensor(owners)
    x, weights = torch.randn(len(owners), 48, generator=generator), torch.randn(count, 24, 48, generator=generator)
    graph = PlannedGraph(Plan(scheme, scheme))
    rows = Sorted(graph.input("counts", INT64, [count]), graph.input("owners", INT64, ["rows"]))
    given = Rows(graph, graph.input("x", FLOAT, ["rows", 48]))
    graph.output(graph.experts("w", "down_proj", weights, given, rows), "y", FLOAT, ["rows", 24])
    graph.save(tmp_path / "experts.onnx")
    feed = {"x": x, "counts": torch.bincount(numbers, minlength=count), "owners": numbers}
    session = opened(tmp_path / "experts.onnx")
    read = {value.name for value in session.get_inputs()}
    computed = session.run(None, {name: value.numpy() for name, value in feed.items() if name in read})[0]
    expected = torch.cat([scheme.project(x[row : row + 1], weights[owner]) for row, owner in enumerate(owners)])
    assert (torch.from_numpy(computed) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_one_more_expert_with_a_scale_a_token_is_one_more_node() -> None:
    counts = []
    for experts in (4, 9):
        graph, weights = PlannedGraph(EIGHT), torch.randn(experts, 24, 48)
        graph.experts("w", "down_proj", weights, Rows(graph, "x"), Sorted("counts", "owners"))
        counts.append(len(graph.nodes))
    assert counts[1] - counts[0] == 5


@pytest.mark.parametrize("scheme", [Blockwise(4, 32), Blockwise(8, 32), Blockwise(8, 64)], ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_all_experts_in_one_node_are_each_the_product_of_fake_quantization(
    tokens: int, scheme: Blockwise, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    # 22 inputs of down_proj do not fill a block.
    x, gate_up = torch.randn(tokens, 64, generator=generator), torch.randn(5, 44, 64, generator=generator)
    down, gates = torch.randn(5, 64, 22, generator=generator), torch.rand(tokens, 5, generator=generator)
    gates[torch.arange(tokens), torch.arange(tokens) % 5] = 0
    gates[torch.arange(tokens), (torch.arange(tokens) + 2) % 5] = 0
    graph = Graph("experts")
    inputs = graph.input("x", FLOAT, ["tokens", 64]), graph.input("gates", FLOAT, ["tokens", 5])
    graph.output(scheme.mixture(graph, "w", gate_up, down, *inputs, chosen=3), "y", FLOAT, ["tokens", 64])
    graph.save(tmp_path / "experts.onnx")
    computed = opened(tmp_path / "experts.onnx").run(None, {"x": x.numpy(), "gates": gates.numpy()})[0]
    expected = torch.zeros(tokens, 64)
    for index in range(5):
        hidden = gated(scheme.project(x, gate_up[index]))
        expected += gates[:, index : index + 1] * scheme.project(hidden, down[index])
    assert (torch.from_numpy(computed) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gradient_passes_straight_through_the_rounding_of_blocks(bits: int) -> None:
    x, weight = torch.randn(5, 40, requires_grad=True), torch.randn(3, 40, requires_grad=True)
    Blockwise(bits, 32).project(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad, blockwise.fake_quant_weight(weight, bits, 32).sum(dim=0).expand(5, 40))
    torch.testing.assert_close(weight.grad, blockwise.fake_quant_activations(x, 32).sum(dim=0).expand(3, 40))


def test_the_gradient_passes_straight_through_the_rounding() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    PerToken().project(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad, per_token.fake_quant_rows(weight).sum(dim=0).expand(5, 8))
    torch.testing.assert_close(weight.grad, per_token.fake_quant_tokens(x).sum(dim=0).expand(3, 8))


def test_the_gradient_passes_through_a_fixed_range_but_not_where_it_clips() -> None:
    within = Range.over(-1.0, 2.0)
    x = torch.tensor([[-1.2, -0.9, 0.0, 1.9, 2.3]], requires_grad=True)
    Static(within).project(x, torch.ones(1, 5)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]))


def test_rounding_to_int8_is_within_half_a_level() -> None:
    weight = torch.randn(6, 40) * torch.logspace(-3, 3, 6).unsqueeze(1)
    integers, scales = per_token.quantize_weight(weight)
    assert integers.abs().max() == 127
    assert ((integers * scales - weight).abs() <= scales / 2 * 1.0001).all()


@pytest.mark.parametrize(("bits", "levels"), [(4, 7), (8, 127)])
def test_rounding_blocks_is_within_half_a_level_of_each(bits: int, levels: int) -> None:
    weight = torch.randn(6, 40) * torch.logspace(-3, 3, 6).unsqueeze(1)
    weight[2, :32] = 0
    integers, scales = blockwise.quantize_weight(weight, bits, 32)
    assert integers.shape == (6, 2, 32)
    assert integers.abs().max() == levels
    assert ((integers * scales).flatten(1)[:, :40] - weight).abs().max() <= scales.max() / 2 * 1.0001
    assert (integers[2, 0] == 0).all()
