"""Long windows of a large vocabulary are scored piece by piece: the same scores, and never all logits at once."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from odd import make_grouped, make_grouped_mixture, make_model

from lm import hugging_face, onnx_model
from lm.model import LanguageModel
from lm.quantization import Plan
from lm.runtime import Generator
from lm.scheme import Float
from tasks.evaluate import score
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
