"""The INT8 graph against its twin in floating point."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from lm import fake_quant, onnx_int8
from lm.graph import FLOAT, Graph
from lm.model import LanguageModel


def _session(model: LanguageModel, folder: Path) -> onnxruntime.InferenceSession:
    onnx_int8.export(model, folder / "model.onnx")
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def _run(
    session: onnxruntime.InferenceSession, ids: torch.Tensor, past: list[np.ndarray] | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    names = [value.name for value in session.get_inputs() if value.name != "input_ids"]
    width = session.get_inputs()[1].shape[2]
    past = past or [np.zeros((len(ids), 0, width), np.float32) for _ in names]
    logits, *present = session.run(None, {"input_ids": ids.numpy(), **dict(zip(names, past, strict=True))})
    outputs = [value.name for value in session.get_outputs()]
    ordered = dict(zip(outputs, [logits, *present], strict=True))
    return ordered.pop("logits"), [ordered[name.replace("past", "present")] for name in names]


@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (33, 129)])
def test_a_quantized_product_is_that_of_fake_quantization(shape: tuple[int, int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    # Tokens of very different sizes, one all zero, one all positive: each has its own scale and zero point.
    x = torch.randn(shape, generator=generator) * torch.logspace(-4, 4, shape[0]).unsqueeze(1)
    x[0] = 0.0
    x[-1] = x[-1].abs() + 1
    weight = torch.randn(24, shape[1], generator=generator)
    graph = Graph("product")
    tokens = onnx_int8.quantize_tokens(graph, graph.input("x", FLOAT, ["tokens", shape[1]]))
    graph.output(onnx_int8.linear(graph, "w", weight, tokens), "y", FLOAT, ["tokens", 24])
    graph.save(tmp_path / "product.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "product.onnx", providers=["CPUExecutionProvider"])
    computed = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    expected = fake_quant.fake_quant_linear(x, weight)
    size = expected.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    assert ((computed - expected) / size).abs().max() < 1e-5


def test_the_graph_computes_what_fake_quantization_learned(
    model: LanguageModel, ids: torch.Tensor, tmp_path: Path
) -> None:
    session = _session(model, tmp_path)
    with torch.no_grad():
        expected_float = model(ids).numpy()
        expected = fake_quant.prepare(model)(ids).numpy()
    computed, _ = _run(session, ids)
    error = np.abs(computed - expected).max(axis=-1).flatten()
    # Two orders of summation differ in the seventh digit; where that tips a value over a rounding boundary, all later
    # tokens differ by one level of one value. The tokens before are equal to the last digits.
    assert np.quantile(error, 0.25) < 2e-5
    assert np.abs(computed - expected).mean() < 0.5 * np.abs(expected_float - expected).mean()


def test_a_tokens_logits_do_not_depend_on_its_batch(model: LanguageModel, ids: torch.Tensor, tmp_path: Path) -> None:
    session = _session(model, tmp_path)
    together, _ = _run(session, torch.cat([ids, 100 * torch.ones_like(ids[:1])]))
    alone, _ = _run(session, ids[:1, :9])
    np.testing.assert_allclose(alone[0], together[0, :9], atol=1e-5)


def test_decoding_token_by_token_continues_the_prefill(model: LanguageModel, ids: torch.Tensor, tmp_path: Path) -> None:
    session = _session(model, tmp_path)
    whole, cache = _run(session, ids)
    steps, past = [], None
    for position in range(ids.shape[1]):
        logits, past = _run(session, ids[:, position : position + 1], past)
        steps.append(logits)
    error = np.abs(np.concatenate(steps, axis=1) - whole).max(axis=-1)
    assert np.median(error) < 1e-5
    for one, other in zip(past, cache, strict=True):
        assert one.shape == other.shape == (2, 33, 26)


def test_exporting_twice_gives_the_same_bytes(model: LanguageModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        onnx_int8.export(model, tmp_path / name / "model.onnx")
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_expert_without_tokens_does_no_harm(ids: torch.Tensor, tmp_path: Path, model: LanguageModel) -> None:
    for router in model.routers():
        router.e_score_correction_bias[:] = torch.tensor([-9.0, *[0.0] * 7])
    logits, _ = _run(_session(model, tmp_path), ids)
    assert np.isfinite(logits).all()


def test_the_gradient_passes_straight_through_the_rounding() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    fake_quant.fake_quant_linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad, fake_quant.fake_quant_rows(weight).sum(dim=0).expand(5, 8))
    torch.testing.assert_close(weight.grad, fake_quant.fake_quant_tokens(x).sum(dim=0).expand(3, 8))


def test_rounding_to_int8_is_within_half_a_level() -> None:
    weight = torch.randn(6, 40) * torch.logspace(-3, 3, 6).unsqueeze(1)
    integers, scales = fake_quant.quantize_weight(weight)
    assert integers.abs().max() == 127
    assert ((integers * scales - weight).abs() <= scales / 2 * 1.0001).all()
