"""Quantization: schemes are tried, measured and kept by what they lose, and the stage resumes like training does."""

import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import disturb
import forked
import numpy as np
import onnx
import pytest
import tiny
import torch
from odd import make_model, write_checkpoint
from onnx import numpy_helper
from waiting import until

from lm import blockwise, hugging_face
from lm.quantization import PLANS, prepare
from tasks.bootstrap import Estimate
from tasks.champion import MODEL_FILES
from tasks.curve import Curve
from tasks.errors import EXIT_TRY_AGAIN
from tasks.evaluate.graphs import graphs
from tasks.quantize import worker
from tasks.quantize.params import QuantizeParams, SchemeName
from tasks.quantize.schemes import Measure, Trial, plan_name, plan_of
from tasks.section import read_section
from tasks.shards import WindowReader
from tasks.world import World

PLAN = PLANS["per-token-8"]


def _trial(
    scheme: SchemeName, after: Literal["post-training", "fine-tuning"], value: float, high: float | None
) -> Trial:
    loss = Estimate(value=value, low=None if high is None else value - 0.01, high=high)
    return Trial(scheme=scheme, after=after, relative_loss=loss, kl_divergence=loss)


BLOCKS = _trial("weight-only-8", "post-training", 0.001, 0.003)
ROUNDED = _trial("qat", "post-training", 0.0005, 0.0009)


@pytest.mark.parametrize(
    ("blocks", "tuned", "kept", "attempts"),
    [
        # The interval's upper end decides, and of what is fine-tuned what comes of that.
        (_trial("weight-only-8", "post-training", 0.001, 0.0019), None, "weight-only-8", ["weight-only-8"]),
        (BLOCKS, _trial("qat", "fine-tuning", 0.0015, 0.0019), "qat", ["weight-only-8", "qat"]),
        (BLOCKS, _trial("qat", "fine-tuning", 0.0019, 0.0021), "weight-only-8", ["weight-only-8", "qat"]),
        (BLOCKS, _trial("qat", "fine-tuning", 0.0009, 0.0021), "qat", ["weight-only-8", "qat"]),
        # Of one window there is no interval, and nothing is known.
        (
            _trial("weight-only-8", "post-training", 0.0, None),
            _trial("qat", "fine-tuning", 0.001, 0.0015),
            *("qat", ["weight-only-8", "qat"]),
        ),
    ],
)
def test_auto_keeps_the_first_whose_loss_is_surely_below_the_limit_or_the_least(
    blocks: Trial, tuned: Trial | None, kept: str, attempts: list[str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = {"weight-only-8": (blocks,), "qat": (ROUNDED, tuned)}
    asked: list[str] = []

    class MadeUp:
        def __init__(self, *_: object) -> None:
            self.measure = SimpleNamespace(count=8)

        def attempt(self, name: str) -> Any:
            asked.append(name)
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
            return worker.Attempt(model, PLAN, PLAN, Curve(), trials[name])  # type: ignore[arg-type]

    monkeypatch.chdir(trained)
    monkeypatch.setattr(worker, "_Schemes", MadeUp)
    tiny.write_params(trained, quantize__scheme="auto", quantize__max_relative_loss=0.002)
    params = read_section("quantize", QuantizeParams)
    _, _, found, _ = worker.quantize(params, None, None, None)  # type: ignore[arg-type]
    assert found.scheme == kept
    assert found.fine_tuned == (kept == "qat")
    # The one that is kept after others were tried is made once more.
    assert asked == attempts + ([kept] if attempts[-1] != kept else [])
    assert found.trials == tuple(itertools.chain.from_iterable(trials[name] for name in attempts))


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
    # Of what was not fine-tuned in the end, there is no speed either.
    assert (len((trained / "speed/quantize.csv").read_text().splitlines()) > 1) == (kept == "weight-only-4")


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
    code, output = tiny.run("quantize", trained, disturb.count_models, COUNTS=str(counts))
    assert code == 0, output
    # What was tried before is gone when the next one is made: beside that there is the float model alone.
    assert counts.read_text().split() == ["0", *["1"] * (2 if kept == "qat" else 3)]
    found = json.loads((trained / "models/int8/quantization.json").read_text())
    tried = [f"{trial['scheme']} {trial['after']}" for trial in found["trials"]]
    assert tried == ["weight-only-8 post-training", "qat post-training", "qat fine-tuning"]
    first, _, last = (trial["relative_loss"]["value"] for trial in found["trials"])
    assert (found["scheme"], found["fine_tuned"]) == (kept, kept == "qat")
    assert (last < first) == (kept == "qat")
    # Of a scheme that was tried and not kept nothing is left.
    assert (trained / "models/int8/post_training").exists() == (kept == "qat")
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


@pytest.mark.parametrize(
    ("scheme", "rotate", "hidden_size", "plan"),
    [
        ("weight-only-8", True, 128, "blockwise-8-wide"),
        ("weight-only-8", True, 96, "blockwise-8"),
        ("weight-only-8", False, 128, "blockwise-8"),
        ("weight-only-4", True, 128, "blockwise-4"),
    ],
)
def test_blocks_are_wide_where_a_rotated_model_is_whole_ones_wide(
    scheme: SchemeName, rotate: bool, hidden_size: int, plan: str, trained: Path
) -> None:
    params = read_section("quantize", QuantizeParams, tiny.ROOT / "params.yaml").model_copy(update={"rotate": rotate})
    config = hugging_face.load(trained / "models/float").config.model_copy(update={"hidden_size": hidden_size})
    assert plan_name(scheme, params, config) == plan
    assert plan_of(scheme, params, config).others == PLANS[plan].others


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
    # What `down_proj` reads is turned while the model runs, too.
    assert ("turn_48" in stored) == rotated
    if scheme == "weight-only-8":
        name = "model.layers.0.mlp.down_proj"
        weight = hugging_face.load(trained / "models/float").model.layers[0].mlp.down_proj.weight
        integers, _ = blockwise.quantize_weight(weight.detach(), 8, 32)
        assert stored[f"{name}.int8"].shape == integers.shape
        same = (stored[f"{name}.int8"] == integers.numpy() + 128).all()
        assert same == (not rotated and not compensated)


@pytest.mark.parametrize("corrected", [True, False])
def test_what_fine_tuning_begins_with_is_what_the_same_roundings_make_without_it(
    trained: Path, corrected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {f"quantize__{name}": corrected for name in ("rotate", "compensate")}
    made = {}
    for scheme in ("dynamic", "qat"):
        tiny.write_params(trained, **tiny.ALONE, **settings, quantize__scheme=scheme)
        code, output = tiny.run("quantize", trained)
        assert code == 0, output
        made[scheme] = tiny.files_of(trained / "models/int8")
    before = {name: made["qat"].pop(f"post_training/{name}") for name in MODEL_FILES}
    assert before == {name: made["dynamic"][name] for name in MODEL_FILES}
    assert before["model.onnx.data"] != made["qat"]["model.onnx.data"]
    # And nothing else is left beside the model.
    assert made["qat"].keys() == made["dynamic"].keys()
    monkeypatch.chdir(trained)
    with graphs(hugging_face.load(Path("models/float"))) as folders:
        assert folders.keys() == {"int8", "post_training"} | ({"rounded"} if corrected else set())
        if corrected:
            assert tiny.files_of(folders["rounded"])["model.onnx.data"] != before["model.onnx.data"]


@pytest.mark.parametrize("scheme", ["static", "qat"])
def test_routers_and_norms_are_rounded_if_they_are_to_be(
    trained: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"quantize__routers": "int8", "quantize__norms": "int8"}
    tiny.write_params(trained, **tiny.ALONE, quantize__scheme=scheme, **chosen)
    code, output = tiny.run("quantize", trained)
    assert code == 0, output
    made = json.loads((trained / "models/int8/quantization.json").read_text())
    assert (made["routers"], made["norms"]) == ("int8", "int8")
    found = json.loads((trained / "models/int8/audit.json").read_text())
    assert not any("gate.weight" in name for name in found["float_products"])
    # The float model that is evaluated beside it is rounded in the same places.
    monkeypatch.chdir(trained)
    with graphs(hugging_face.load(Path("models/float"))) as folders:
        beside = onnx.load(folders["rounded"] / "model.onnx", load_external_data=False).graph.initializer
    assert {"model.layers.1.mlp.gate.int8", "model.norm.int8"} <= {tensor.name for tensor in beside}


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["*.o_prj"], "no layer's name matches '*.o_prj'. Names are model.layers.0.self_attn."),
        (["*"], "leaves no layer to quantize"),
        # But routers, which are float anyway.
        (["*_proj", "*_mqa", "*.experts", "lm_head"], "leaves no layer to quantize"),
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
    ("model", "told", "block", "node"),
    [
        (tiny.LLAMA, ["A Qwen3-style language model of"], 32, "MatMulNBits"),
        (
            {**tiny.QWEN3_MOE, "hidden_size": 64},
            ["A Qwen3-MoE-style language model of", "| busiest expert's tokens over the mean's | "],
            64,
            "QMoE",
        ),
    ],
    ids=["dense", "experts"],
)
def test_families_with_grouped_queries_go_through_all_stages_of_the_model(
    model: dict[str, Any], told: list[str], block: int, node: str, tmp_path: Path
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
    # Wide blocks are whole ones.
    assert all(words in card for words in (*told, f"one scale a block of {block} inputs"))
    assert node in json.loads((tmp_path / "models/int8/audit.json").read_text())["operators"]
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
    code, output = tiny.run("quantize", tmp_path, disturb.stall_a_checkpoint, STALLS="4")
    assert code == EXIT_TRY_AGAIN, output
    # The second process has nothing to write, and would be killed if it did not beat any more.
    told = tiny.error_line(output)
    assert told.startswith("no process came through the checkpoint of step 4: the network between them, or a disk, "), (
        told
    )


def test_whoever_writes_what_fine_tuning_begins_with_is_waited_for(trained: Path) -> None:
    tiny.write_params(trained, quantize__hang_timeout_seconds=3.0)
    # Longer than a process may keep the others waiting once training has begun.
    code, output = tiny.run("quantize", trained, disturb.slow_the_first_graph, SLOW="9")
    assert code == 0, output


@pytest.mark.parametrize("shard", [1, 2])
def test_a_killed_quantization_goes_on_to_the_same_bytes(trained: Path, shard: int) -> None:
    tiny.write_params(trained, quantize__mesh={"shard": shard})
    # As a model has it that was taught to converse.
    (trained / "models/float/chat_template.jinja").write_text(tiny.CHATML)
    code, output = tiny.run("quantize", trained)
    assert code == 0, output
    expected = tiny.files_of(trained / "models/int8")
    assert expected["chat_template.jinja"] == tiny.CHATML.encode()
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json", "audit.json"} <= expected.keys()
    assert expected["post_training/model.onnx.data"] != expected["model.onnx.data"]
    report = json.loads(expected["audit.json"])
    assert report["quantized_share_of_bytes"] > 0.5

    shutil.rmtree(trained / ".overnight/checkpoints/quantize")
    log = trained / "log"
    # Before it comes to its last checkpoint, however quick it is.
    process = forked.stage("quantize", trained, log, {**os.environ, "STALLS": "4"}, disturb.stall_a_checkpoint)
    until(lambda: any(trained.glob(".overnight/checkpoints/quantize/*/*.pt")), told=log.read_text)
    assert process.is_alive(), log.read_text()
    process.kill()
    process.join()
    # It had been at that for as long as it had fine-tuned.
    assert [*(trained / "models").glob(".partial-*")]
    code, output = tiny.run("quantize", trained)
    assert code == 0, output
    assert "goes on after step" in output
    assert tiny.files_of(trained / "models/int8") == expected
    assert not [*(trained / "models").glob(".partial-*")]
