"""The graph in ONNX's own operators: it computes what onnxruntime's do, and ONNX's reference of them does so too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import torch
from graphs import CALIBRATION
from odd import make_grouped, make_grouped_mixture, make_model
from onnx.reference import ReferenceEvaluator

from lm import onnx_model, onnx_standard
from lm.calibration import calibrate
from lm.graph import nodes_of
from lm.model import LanguageModel
from lm.quantization import PLANS

Run = Callable[[dict[str, np.ndarray]], list[Any]]
CAPACITY = 40


def written(model: LanguageModel, plan: str, folder: Path) -> tuple[Path, Path]:
    """Where the graph lies, and the same in ONNX's own operators."""
    source, target = folder / "model.onnx", folder / "standard.onnx"
    onnx_model.export(model, calibrate(model, PLANS[plan], CALIBRATION), source)
    onnx_standard.write(source, target)
    return source, target


def opened(path: Path) -> Run:
    """onnxruntime's run of the graph in ``path``."""
    session = graphs.opened(path)
    return lambda feed: session.run(None, feed)


def logits(run: Run, path: Path, ids: np.ndarray, steps: int) -> np.ndarray:
    """The logits of ``ids`` but for the last ``steps``, which are then read one after the other.

    Each row has so many tokens less in its cache by then as its number says: it forgets its last ones.
    """
    graph = onnx.load(path, load_external_data=False).graph
    sizes = {"batch": len(ids), "capacity": CAPACITY}
    past: dict[str, Any] = {
        value.name: np.zeros(
            [sizes[axis.dim_param] if axis.dim_param else axis.dim_value for axis in value.type.tensor_type.shape.dim],
            np.float32,
        )
        for value in graph.input
        if value.name.startswith("past_")
    }
    names, found, start = [value.name for value in graph.output], [], 0
    for length in (ids.shape[1] - steps, *[1] * steps):
        kept = np.broadcast_to(np.arange(length), (len(ids), length))
        positions = kept + start - (np.arange(len(ids))[:, None] if start else 0)
        feed = {"input_ids": ids[:, start : start + length], "positions": positions, "logits_to_keep": kept}
        results = dict(zip(names, run({**feed, **past}), strict=True))
        found.append(results.pop("logits"))
        past = {name.replace("present_", "past_"): cache for name, cache in results.items()}
        start += length
    return np.concatenate(found, axis=1)


def check(found: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(found - expected).max(axis=-1).flatten()
    # Another order of sums may tip a value over a rounding boundary; else they are equal but for the last digits.
    assert np.quantile(error, 0.25) < 2e-5, error
    assert error.mean() < 0.06 * expected.std(), error


# The other two are lowered to the same operators.
@pytest.mark.parametrize("plan", ["per-token-8", "blockwise-8", "blockwise-4"])
def test_onnxruntime_computes_the_same_in_every_scheme_and_family(
    model: LanguageModel, ids: torch.Tensor, plan: str, tmp_path: Path
) -> None:
    source, target = written(model, plan, tmp_path)
    assert {node.domain for node in nodes_of(onnx.load(target).graph)} == {""}
    check(*(logits(opened(path), path, ids.numpy(), 3) for path in (target, source)))


@pytest.mark.parametrize(
    ("make", "changes", "plan"),
    [
        (make_model, {}, "per-token-8"),
        (make_grouped, {}, "blockwise-4"),
        (make_grouped_mixture, {"hidden_size": 64}, "blockwise-8"),
    ],
)
def test_what_onnx_says_that_its_operators_compute_is_the_same(
    make: Callable[..., LanguageModel], changes: dict[str, Any], plan: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    source, target = written(make(num_hidden_layers=2, **changes), plan, tmp_path)
    reference = ReferenceEvaluator(str(target))
    found = logits(lambda feed: reference.run(None, feed), target, ids.numpy()[:, :7], 1)
    check(found, logits(opened(source), source, ids.numpy()[:, :7], 1))


def test_writing_twice_gives_the_same_bytes_and_nothing_that_nobody_reads(tmp_path: Path) -> None:
    source, target = written(make_grouped(), "blockwise-8", tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    onnx_standard.write(source, again / target.name)
    for name in (target.name, f"{target.name}.data"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    graph = onnx.load(target).graph
    read = {name for node in nodes_of(graph) for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
