"""Evaluation: each part against a computation by hand, and the stage on a tiny project."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.bootstrap import Bootstrap
from tasks.evaluate import baselines, report
from tasks.evaluate.ngram import UNICODE, NGram
from tasks.evaluate.score import COLUMNS, Scores, windows_of


@settings(deadline=None)
@given(length=st.integers(1, 200), context=st.integers(2, 50))
def test_every_token_is_scored_once_with_at_least_half_a_context(length: int, context: int) -> None:
    tokens = np.arange(length, dtype=np.int64)
    windows = list(windows_of(0, tokens, context))
    scored = [token for window in windows for token in window.targets[window.first :].tolist()]
    assert scored == list(range(1, length))
    for window in windows:
        assert len(window.inputs) <= context
        assert (window.targets == window.inputs + 1).all()
    assert all(window.first >= context // 2 for window in windows[1:])


def test_a_bigram_model_is_witten_and_bells_by_hand() -> None:
    # "abab": unigrams a 2, b 2, two types of 4; after the start: a; after a: b twice; after b: a once.
    model = NGram(["abab"], order=2)
    unseen = 1 / 3
    p_a = (2 + 2 * unseen) / (4 + 2)
    p_a_start = (1 + 1 * p_a) / (1 + 1)
    p_b_after_a = (2 + 1 * p_a) / (2 + 1)
    assert model.bits(["ab"])[0] == pytest.approx(-math.log2(p_a_start) - math.log2(p_b_after_a))
    # Nothing is known after a character never seen, and nothing of it but that it is one of Unicode's.
    p_never = (0 + 2 * unseen) / 6
    assert model.bits(["é"])[0] == pytest.approx(-math.log2(p_never * 1 / (1 + 1) / UNICODE))


def test_the_ngram_models_probabilities_sum_to_one() -> None:
    model = NGram(["the cat sat", "on the mat"], order=4)
    alphabet = sorted(set("the cat saton the mat"))
    for context in ("", "t", "the ", "zz", "at"):
        before = model.bits([context])[0]
        known = sum(2 ** (before - bits) for bits in model.bits([context + letter for letter in alphabet]))
        never = 2 ** (before - model.bits([context + "☃"])[0]) * UNICODE
        assert known + never == pytest.approx(1)


def test_a_longer_context_helps_on_text_like_the_training_text() -> None:
    texts = ["in the beginning was the word and the word was good " * 20]
    costs = [NGram(texts, order).bits(["the beginning was the word and"])[0] for order in (2, 3, 5)]
    assert costs[0] > costs[1] > costs[2]


def test_xz_is_primed_with_the_training_text() -> None:
    generator = np.random.default_rng(0)
    noise = "".join(chr(97 + value) for value in generator.integers(0, 26, 4000))
    bootstrap = Bootstrap(1, 100, 0)
    primed = baselines.measure([noise], [noise], 3, bootstrap).xz.bits_per_byte.value
    alone = baselines.measure(["x"], [noise], 3, bootstrap).xz.bits_per_byte.value
    assert primed < 0.2
    assert alone > math.log2(26) * 0.95


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(1).normal(10, 2, 400)
    estimate = Bootstrap(400, 4000, 0).ratio(values, np.ones(400))
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)


def test_a_paired_difference_has_a_narrower_interval_than_its_parts() -> None:
    generator = np.random.default_rng(2)
    nats = generator.uniform(50, 500, 100)
    worse = nats * 1.01 + generator.normal(0, 0.5, 100)
    bootstrap = Bootstrap(100, 1000, 0)
    paired = bootstrap.ratio(worse - nats, nats)
    alone = bootstrap.ratio(nats, np.ones(100))
    assert paired.value == pytest.approx(0.01, abs=0.001)
    assert paired.high - paired.low < 0.002 < (alone.high - alone.low) / alone.value


def test_bits_per_byte_leave_special_tokens_out() -> None:
    table = np.zeros((2, len(COLUMNS)))
    table[:, COLUMNS.index("tokens")], table[:, COLUMNS.index("bytes")] = 10, 40
    table[:, COLUMNS.index("nats_float")] = table[:, COLUMNS.index("nats_int8")] = 40 * math.log(2)
    models = report.models(Scores(table), Bootstrap(2, 100, 0))
    assert models.float.bits_per_byte.value == 1.0
    assert models.float.nats_per_token.value == pytest.approx(4 * math.log(2), abs=1e-6)


@pytest.fixture(scope="module")
def project(candidate: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "project"
    shutil.copytree(candidate, folder)
    tiny.write_champion(folder)
    code, output = tiny.run("evaluate", folder)
    assert code == 0, output
    return folder


def test_float_scores_equal_a_plain_loop_over_documents(project: Path) -> None:
    import torch

    from lm import hugging_face
    from tasks.shards import Shards, read_manifest

    model = hugging_face.load(project / "models/float").eval()
    shards = Shards(project / "data/shards", read_manifest(project / "data/shards"), "test")
    nats = right = tokens = 0.0
    with torch.no_grad():
        for document, _ in shards.documents():
            ids = torch.from_numpy(document.astype(np.int64))
            for position in range(1, len(ids)):
                # The windows of windows_of: a context of 16, walked in halves.
                start = 0 if position <= 16 else 8 * ((position - 17) // 8 + 1)
                logits = model(ids[None, start:position])[0, -1]
                nats -= float(logits.log_softmax(-1)[ids[position]])
                right += float(logits.argmax() == ids[position])
                tokens += 1
    measured = json.loads((project / "models/evaluation.json").read_text())
    assert measured["tokens"] == tokens
    assert measured["models"]["float"]["nats_per_token"]["value"] == pytest.approx(nats / tokens, abs=1e-4)
    assert measured["models"]["float"]["accuracy"]["value"] == pytest.approx(right / tokens, abs=1e-3)


def test_int8_is_close_to_float_but_not_the_same_numbers(project: Path) -> None:
    measured = json.loads((project / "models/evaluation.json").read_text())
    int8 = measured["models"]["int8"]
    assert 0 < int8["kl_divergence"]["value"] < 0.1
    assert 0.5 < int8["same_top_1"]["value"] <= 1
    assert int8["bits_per_byte"] != measured["models"]["float"]["bits_per_byte"]


def test_a_missing_model_names_the_stage_to_run(tmp_path: Path) -> None:
    tiny.write_params(tmp_path)
    tiny.write_shards(tmp_path)
    code, output = tiny.run("evaluate", tmp_path)
    assert code == 2
    assert "models/float/model.safetensors: no such file. Run the stage 'train' first." in tiny.error_line(output)
