"""Long windows of a large vocabulary are scored piece by piece: the same scores, and never all logits at once."""

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from odd import export_over_bytes, make_grouped, make_grouped_mixture, make_model

from lm import hugging_face, onnx_model
from lm.model import LanguageModel
from lm.quantization import Plan
from lm.runtime import Generator
from lm.scheme import Float
from tasks.bootstrap import Bootstrap
from tasks.evaluate import report, score
from tasks.evaluate.routing import FloatRouting, Int8Routing
from tasks.evaluate.score import Scores
from tasks.progress import Lines, Progress

CONTEXT = 24
DRAW = np.random.default_rng(5)
# Shorter than a window, as long as one, and walked in several.
DOCUMENTS = [(DRAW.integers(0, 256, length).astype(np.uint16), length) for length in (2, 9, CONTEXT + 1, 70, 31)]
LEARNED = [DRAW.integers(0, 2, len(tokens)).astype(bool) for tokens, _ in DOCUMENTS]


@pytest.fixture(params=[make_model, make_grouped, make_grouped_mixture])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    words = {"vocab_size": tiny.VOCAB, "bos_token_id": tiny.VOCAB - 1, "eos_token_id": tiny.VOCAB - 1}
    made: LanguageModel = request.param(**words, max_position_embeddings=CONTEXT)
    return made


@pytest.fixture
def folder(model: LanguageModel, tmp_path: Path) -> Path:
    """Its graph in float: what is rounded would tip here and there when sums are taken in another order."""
    tiny.write_tokenizer(tmp_path / "tokenizer.json")
    onnx_model.export(model, Plan(Float(), Float()), tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps(hugging_face.config_to_json(model.config)))
    return tmp_path


def silent() -> Progress:
    return Progress("evaluate", Lines(lambda _: None))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many logits each product of the head gave, of the float model and of graphs."""
    found: list[int] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            result = function(*arguments)
            first = result[0] if isinstance(result, tuple) else result
            found.append(first.size if isinstance(first, np.ndarray) else first.numel())
            return result

        return noted

    for owner, name in ((FloatRouting, "head"), (Int8Routing, "run"), (Generator, "run")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    return found


def check_equal(found: Scores, expected: Scores) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.float.nats, expected.float.nats, rtol=1e-6)
    np.testing.assert_array_equal(found.float.right, expected.float.right)
    ours, theirs = found.quantized["int8"], expected.quantized["int8"]
    np.testing.assert_allclose(ours.nats, theirs.nats, rtol=1e-5)
    np.testing.assert_array_equal(ours.same_top, theirs.same_top)
    np.testing.assert_array_equal(ours.same_experts, theirs.same_experts)
    for one, other in zip(ours.divergence, theirs.divergence, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("make", [make_model, make_grouped_mixture])
def test_what_is_reported_is_what_a_plain_loop_over_tokens_says(
    make: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    words = {"vocab_size": tiny.VOCAB, "bos_token_id": tiny.VOCAB - 1, "eos_token_id": tiny.VOCAB - 1}
    model, folder = make(**words), export_over_bytes(tmp_path / "int8", make)
    # Of one length: they are one batch, here and there.
    documents = [(DRAW.integers(0, 256, 40).astype(np.uint16), 50 + number) for number in range(3)]
    routed = Int8Routing(folder, model)
    scores = score.score(copy.deepcopy(model), {"int8": routed}, documents, 1, silent())
    layers = tuple(range(len(model.routers())))
    found = report.models(scores, Bootstrap(len(documents), 50, 0), layers)

    ids = np.stack([tokens.astype(np.int64) for tokens, _ in documents])
    graph = Generator(folder, threads=1)
    logits = graph.run(ids[:, :-1], graph.new_cache(len(ids)))
    _, chosen = routed.run(ids[:, :-1], routed.new_cache(len(ids)))
    with torch.no_grad():
        x = FloatRouting(copy.deepcopy(model).eval())
        hidden, expected = x.run(ids[:, :-1])
        floats = x.head(hidden).double().numpy()
    nats, theirs, right, same_top, divergences = 0.0, 0.0, 0, 0, []
    same = np.zeros(len(layers))
    for row, place in itertools.product(range(len(ids)), range(ids.shape[1] - 1)):
        p, q = (np.exp(line - line.max()) for line in (floats[row, place], logits[row, place].astype(np.float64)))
        p, q = p / p.sum(), q / q.sum()
        target = ids[row, place + 1]
        nats, theirs = nats - np.log(q[target]), theirs - np.log(p[target])
        right += q.argmax() == target
        same_top += q.argmax() == p.argmax()
        divergences.append((p * (np.log(p) - np.log(q))).sum())
        for layer in layers:
            same[layer] += {*chosen[layer, row, place].tolist()} == {*expected[layer, row, place].tolist()}
    count = len(divergences)
    int8 = found.int8
    assert int8.bits_per_byte.value == pytest.approx(nats / math.log(2) / sum(size for _, size in documents), abs=1e-5)
    assert int8.relative_loss.value == pytest.approx(nats / theirs - 1, abs=1e-5)
    assert int8.accuracy.value == pytest.approx(right / count, abs=1e-6)
    assert int8.same_top_1.value == pytest.approx(same_top / count, abs=1e-6)
    assert int8.kl_divergence.value == pytest.approx(np.mean(divergences), abs=1e-5)
    assert int8.kl_divergence_99.value == pytest.approx(np.quantile(divergences, 0.99, method="inverted_cdf"), abs=1e-5)
    assert [one.share.value for one in int8.same_experts] == pytest.approx(same / count, abs=1e-6)
    # What could be taken for another is another.
    assert 0 < int8.same_top_1.value < 1
    assert all(0 < share < 1 for share in same / count)
    assert len(layers) > 0


@pytest.mark.parametrize("learned", [None, LEARNED])
# Token by token, in pieces of seven of one window, and two windows together.
@pytest.mark.parametrize(("at_once", "largest"), [(0, 1), (7, 7), (50, 2 * CONTEXT)])
def test_pieces_are_scored_as_the_whole_is(
    model: LanguageModel,
    folder: Path,
    learned: list[np.ndarray] | None,
    at_once: int,
    largest: int,
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scores() -> tuple[Scores, np.ndarray]:
        quantized = {"int8": Int8Routing(folder, model)}
        found = score.score(copy.deepcopy(model), quantized, DOCUMENTS, 2, silent(), learned)
        ids = [tokens.astype(np.int64) for tokens, _ in DOCUMENTS]
        return found, score.nats_of(Generator(folder, threads=1), ids, 2, silent(), learned)

    expected, nats = scores()
    assert max(sizes) == 8 * CONTEXT * tiny.VOCAB
    sizes.clear()
    monkeypatch.setattr(score, "LOGITS_AT_ONCE", at_once * tiny.VOCAB)
    found, nats_found = scores()
    assert max(sizes) == largest * tiny.VOCAB
    check_equal(found, expected)
    np.testing.assert_allclose(nats_found, nats, rtol=1e-5)
    assert (nats[1:] > 0).all()
    assert (expected.quantized["int8"].divergence[-1] > 0).any()
