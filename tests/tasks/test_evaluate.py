"""Evaluation: each part against a computation by hand, and the stage on a tiny project."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.bootstrap import SHARE, Bootstrap, students_t
from tasks.evaluate import baselines, report
from tasks.evaluate.ngram import UNICODE, NGram
from tasks.evaluate.score import Marks, Quantized, Scores, windows_of
from tasks.evaluate.texts import Documents, drawn, last
from tasks.progress import Lines, Progress


@settings(deadline=None)
@given(length=st.integers(1, 200), context=st.integers(2, 50))
def test_every_token_is_scored_once_with_at_least_half_a_context(length: int, context: int) -> None:
    tokens = np.arange(length, dtype=np.int64)
    windows = list(windows_of(0, tokens, context))
    scored = [token for window in windows for token in window.targets[window.scored].tolist()]
    assert scored == list(range(1, length))
    for window in windows:
        assert len(window.inputs) <= context
        assert (window.targets == window.inputs + 1).all()
    assert all(window.scored[0] >= context // 2 for window in windows[1:])


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
    silent = Progress("evaluate", Lines(lambda _: None))
    primed = baselines.measure([noise], [noise], 3, bootstrap, silent).xz.bits_per_byte.value
    alone = baselines.measure(["x"], [noise], 3, bootstrap, silent).xz.bits_per_byte.value
    assert primed < 0.2
    assert alone > math.log2(26) * 0.95


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(1).normal(10, 2, 400)
    estimate = Bootstrap(400, 4000, 0).ratio(values, np.ones(400))
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)


@pytest.mark.parametrize("documents", [3, 5, 8])
def test_an_interval_over_few_documents_holds_the_truth_as_often_as_it_says(documents: int) -> None:
    generator, rounds = np.random.default_rng(6), 400
    found = 0
    for seed in range(rounds):
        nats = generator.uniform(500, 1500, documents)
        estimate = Bootstrap(documents, 400, seed).ratio(nats * generator.normal(0.02, 0.01, documents), nats)
        found += estimate.low <= 0.02 <= estimate.high
    # Three standard deviations of such a count.
    assert found / rounds == pytest.approx(0.95, abs=0.033)


def test_students_t_is_that_of_its_tables() -> None:
    for freedom, table in ((1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042), (120, 1.980), (100_000, 1.960)):
        assert students_t(freedom) == pytest.approx(table, rel=1e-3)


def test_a_share_of_few_documents_is_never_more_than_all() -> None:
    estimate = Bootstrap(3, 400, 0).ratio(np.array([1.0, 9.0, 10.0]), np.full(3, 10.0), within=SHARE)
    assert (estimate.low, estimate.high) == (0, 1)


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
    nats, none = np.full(2, 40 * math.log(2)), np.zeros(2)
    same = Quantized(nats, none, [np.zeros(10), np.zeros(10)], none, np.zeros((2, 0)))
    scores = Scores(np.full(2, 10.0), np.full(2, 40.0), Marks(nats, none), {"int8": same})
    models = report.models(scores, Bootstrap(2, 100, 0), ())
    assert models.float.bits_per_byte.value == 1.0
    assert models.float.nats_per_token.value == pytest.approx(4 * math.log(2), abs=1e-6)


def test_a_step_that_changed_nothing_shows_what_the_one_before_does() -> None:
    zero, one, two = np.zeros(2), np.ones(2), np.full(2, 2.0)
    quantized = {
        name: Quantized(nats, zero, [np.zeros(1), np.zeros(1)], zero, np.zeros((2, 0)))
        for name, nats in (("int8", one), ("post_training", two))
    }
    scores = Scores(one, one, Marks(one, zero), quantized)
    bootstrap = Bootstrap(2, 100, 0)
    models = report.models(scores, bootstrap, ())
    # Neither rotated nor compensated, and fine-tuned.
    assert models.rounded is not None
    assert models.rounded == models.post_training != models.int8
    del quantized["post_training"]
    models = report.models(scores, bootstrap, ())
    assert models.rounded is models.post_training is None


def test_a_quantiles_interval_is_that_of_theory() -> None:
    # Documents of ten values each: the quantile of 4,000 independent values, and its interval by their ranks.
    values = np.random.default_rng(3).uniform(0, 1, (400, 10))
    estimate = Bootstrap(400, 1000, 0).quantile(list(values), 0.9)
    assert estimate.value == pytest.approx(np.quantile(values, 0.9, method="inverted_cdf"), abs=1e-6)
    half = 1.96 * math.sqrt(0.9 * 0.1 / 4000)
    assert estimate.low == pytest.approx(estimate.value - half, abs=0.004)
    assert estimate.high == pytest.approx(estimate.value + half, abs=0.004)


def test_a_quantiles_interval_is_wide_where_whole_documents_are_alike() -> None:
    alike = [np.full(10, value) for value in np.random.default_rng(4).uniform(0, 1, 40)]
    estimate = Bootstrap(40, 1000, 0).quantile(alike, 0.9)
    assert estimate.high - estimate.low > 2 * 1.96 * math.sqrt(0.9 * 0.1 / 400)
    assert Bootstrap(1, 1000, 0).quantile(alike[:1], 0.9).low is None


def made_of(*lengths: int) -> Documents:
    draw = np.random.default_rng(5)
    tokens = [(draw.integers(0, 999, length).astype(np.uint16), 4 * length) for length in lengths]
    return Documents(tokens, [np.arange(length) % 2 == number % 2 for number, length in enumerate(lengths)])


def test_documents_are_drawn_whole_in_their_order_until_there_is_enough() -> None:
    found = made_of(*range(1, 200))
    chosen = drawn(found, 3000, 1)
    assert chosen.learned is not None
    sizes = [len(tokens) for tokens, _ in chosen.tokens]
    # All have another length.
    assert sizes == sorted(sizes) == [len(mask) for mask in chosen.learned]
    assert 3000 <= sum(sizes) < 3000 + max(sizes)
    assert drawn(found, sum(range(1, 200)), 1) is found
    assert len(drawn(found, 1, 1).tokens) == 1
    others = [len(tokens) for tokens, _ in drawn(found, 3000, 2).tokens]
    assert len(set(sizes) & set(others)) < len(sizes) // 2


def test_a_document_that_comes_moves_few_of_those_that_are_drawn() -> None:
    found = made_of(*range(1, 200))
    more = Documents([(np.arange(50, dtype=np.uint16), 200), *found.tokens], None)
    before, after = ({len(tokens) for tokens, _ in drawn(one, 3000, 1).tokens} for one in (found, more))
    assert len(before - after) <= 2


def test_a_baseline_knows_the_last_documents_that_fit() -> None:
    found = made_of(10, 20, 30, 40)
    for most, lengths in ((400, [10, 20, 30, 40]), (399, [20, 30, 40]), (160, [40]), (1, [40])):
        assert [len(tokens) for tokens, _ in last(found, most).tokens] == lengths
    assert last(Documents([], None), 9).tokens == []


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
            windows: dict[int, torch.Tensor] = {}
            for position in range(1, len(ids)):
                # The windows of windows_of: a context of 16, walked in halves.
                start = 0 if position <= 16 else 8 * ((position - 17) // 8 + 1)
                if start not in windows:
                    windows[start] = model(ids[None, start : start + 16])[0]
                logits = windows[start][position - 1 - start]
                nats -= float(logits.log_softmax(-1)[ids[position]])
                right += float(logits.argmax() == ids[position])
                tokens += 1
    measured = json.loads((project / "models/evaluation.json").read_text())
    assert measured["tokens"] == tokens
    assert measured["models"]["float"]["nats_per_token"]["value"] == pytest.approx(nats / tokens, abs=1e-4)
    assert measured["models"]["float"]["accuracy"]["value"] == pytest.approx(right / tokens, abs=1e-3)


def test_of_much_test_text_some_documents_are_measured(project: Path, tmp_path: Path) -> None:
    from tasks.shards import Shards, read_manifest

    shutil.copytree(project, tmp_path / "project")
    tiny.write_params(tmp_path / "project", evaluate__test_tokens=150)
    code, output = tiny.run("evaluate", tmp_path / "project")
    assert code == 0, output
    measured, whole = (
        json.loads((folder / "models/evaluation.json").read_text()) for folder in (tmp_path / "project", project)
    )
    documents = Shards(project / "data/shards", read_manifest(project / "data/shards"), "test").documents()
    assert whole["documents"] == whole["documents_in_split"] == measured["documents_in_split"] == len(documents)
    assert 0 < measured["documents"] < len(documents)
    # Each document's first token is not predicted.
    assert measured["tokens"] + measured["documents"] >= 150
    assert measured["bytes"] < whole["bytes"]


def test_int8_is_close_to_float_but_not_the_same_numbers(project: Path) -> None:
    measured = json.loads((project / "models/evaluation.json").read_text())
    int8 = measured["models"]["int8"]
    assert 0 < int8["kl_divergence"]["value"] < 0.1
    assert 0 < int8["kl_divergence"]["value"] < int8["kl_divergence_99"]["value"] < 1
    for estimate in (int8["kl_divergence"], int8["kl_divergence_99"], int8["same_top_1"]):
        assert estimate["low"] < estimate["value"] < estimate["high"]
    assert 0.5 < int8["same_top_1"]["value"] <= 1
    # The second layer is the first with experts.
    (layer,) = int8["same_experts"]
    assert layer["layer"] == 1
    assert 0.5 < layer["share"]["low"] <= layer["share"]["value"] < 1
    assert int8["bits_per_byte"] != measured["models"]["float"]["bits_per_byte"]


def test_each_step_from_float_to_int8_is_measured_on_its_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lm import hugging_face
    from lm.quantization import PLANS, prepare
    from tasks.progress import Lines, Progress
    from tasks.quantize import worker
    from tasks.quantize.params import QuantizeParams
    from tasks.section import read_section
    from tasks.shards import Shards, read_manifest, read_windows
    from tasks.world import World

    monkeypatch.chdir(project)
    manifest, params, plan = read_manifest(), read_section("quantize", QuantizeParams), PLANS["per-token-8"]
    model = hugging_face.load(project / "models/float")
    train = read_windows(manifest, model.config.window).train
    seen = worker.calibration_windows(train, params, World(0, 1, torch.device("cpu"), "fp32"))
    shown = Progress("quantize", Lines(lambda _: None))
    made = {
        "rounded": prepare(hugging_face.load(project / "models/float"), plan),
        "post_training": worker.rounded(model, plan, params, seen, shown)[0],
    }
    measured = json.loads((project / "models/evaluation.json").read_text())["models"]
    assert measured.keys() == {"float", *made, "int8"}
    documents = [document for document, _ in Shards(project / "data/shards", manifest, "test").documents()]
    for step, model in made.items():
        nats = 0.0
        with torch.no_grad():
            for document in documents:
                for window in windows_of(0, document.astype(np.int64), 16):
                    losses = -model.eval()(torch.from_numpy(window.inputs)[None])[0].log_softmax(-1)
                    nats += float(losses[range(len(window.targets)), window.targets][window.scored].sum())
        tokens = sum(len(document) - 1 for document in documents)
        assert measured[step]["nats_per_token"]["value"] == pytest.approx(nats / tokens, abs=3e-4), step
        # Both have stayed with the float model, which a fine-tuning on text leaves.
        assert measured[step]["kl_divergence"]["value"] < 0.5 * measured["int8"]["kl_divergence"]["value"]
        assert measured[step]["nats_per_token"]["value"] > measured["int8"]["nats_per_token"]["high"]
        assert measured[step].keys() == measured["int8"].keys()
    assert measured["rounded"] != measured["post_training"]


def test_a_model_that_is_only_rounded_has_no_such_neighbour(candidate: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(candidate, folder)
    tiny.write_champion(folder)
    tiny.write_params(
        folder, **tiny.ALONE, quantize__scheme="dynamic", quantize__rotate=False, quantize__compensate=False
    )
    for stage in ("quantize", "evaluate"):
        code, output = tiny.run(stage, folder)
        assert code == 0, output
    measured = json.loads((folder / "models/evaluation.json").read_text())["models"]
    assert measured["rounded"] is measured["post_training"] is None


def test_fixed_ranges_are_those_of_the_float_model_where_it_is_only_rounded(candidate: Path, tmp_path: Path) -> None:
    import torch

    from lm import hugging_face
    from lm.calibration import calibrate
    from lm.quantization import PLANS
    from tasks.shards import Shards, read_manifest

    folder = tmp_path / "project"
    shutil.copytree(candidate, folder)
    tiny.write_champion(folder)
    tiny.write_params(folder, **tiny.ALONE, quantize__scheme="static")
    for stage in ("quantize", "evaluate"):
        code, output = tiny.run(stage, folder)
        assert code == 0, output
    measured = json.loads((folder / "models/evaluation.json").read_text())["models"]
    assert 0 < measured["rounded"]["kl_divergence"]["value"] < 0.1
    # Rotated and compensated is what INT8 itself is.
    assert measured["post_training"] is None
    shards = Shards(folder / "data/shards", read_manifest(folder / "data/shards"), "train").reader(16)
    seen = torch.from_numpy(shards.batch(np.arange(16) * len(shards) // 16)).long()[:, :-1]
    expected = calibrate(hugging_face.load(folder / "models/float"), PLANS["static-8"], seen).ranges
    found = json.loads((folder / "models/int8/quantization.json").read_text())["ranges"]
    assert found == {name: dataclasses.asdict(within) for name, within in expected.items()}


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("quantization.json", "missing, or of another version"),
        ("post_training/model.onnx", "no such file"),
    ],
)
def test_what_quantize_has_not_left_names_the_stage_to_run(
    lost: str, told: str, candidate: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(candidate, folder)
    tiny.write_champion(folder)
    (folder / "models/int8" / lost).unlink()
    code, output = tiny.run("evaluate", folder)
    assert code == 2
    assert f"models/int8/{lost}: {told}. Rerun the stage 'quantize'." in tiny.error_line(output)


def test_a_missing_model_names_the_stage_to_run(tmp_path: Path) -> None:
    tiny.write_params(tmp_path)
    tiny.write_shards(tmp_path)
    code, output = tiny.run("evaluate", tmp_path)
    assert code == 2
    assert "models/float/config.json: no such file. Run the stage 'train' first." in tiny.error_line(output)
