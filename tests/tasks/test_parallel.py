"""Every mesh trains as one process does. Tolerances are for fp32 and sums in another order, nothing else."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import forked
import meshes
import one_process
import pytest
import tiny
import torch
from meshes import Case, Result

from lm.model import LanguageModel
from tasks.errors import BadParameter
from tasks.parallel.pipeline import cause_told
from tasks.parallel.stages import balanced, stages_of
from tasks.section import read_section
from tasks.train.params import TrainParams

ROOT = Path(__file__).parents[2]
Trained = Callable[[Case], Result]

# Each axis takes all steps on two processes; how they combine, and what a model has besides, shows in a few: in the
# second step the first one's changes take part.
FEW = 2
TWO = [
    Case({}),
    Case({}, micro_batch=4, steps=FEW),
    Case({"shard": 2}, micro_batch=4),
    Case({"shard": 2}, "qwen3", steps=FEW),
    Case({"expert": 2}, micro_batch=1),
    Case({"expert": 2}, "latent-uneven", recomputed="selective", steps=FEW),
    Case({"expert": 2}, "qwen3-moe", steps=FEW),
    Case({"tensor": 2}, "qwen3-moe", micro_batch=4, steps=FEW),
    Case({"pipeline": 2, "pipeline_schedule": "zero-bubble"}, "qwen3-moe", steps=FEW),
    Case({"tensor": 2}, "qwen2-moe", micro_batch=4, steps=FEW),
    # Its gates of one row are whole in one process, and nothing in the other.
    Case({"expert": 2}, "qwen2-moe", steps=FEW),
    Case({"tensor": 2}, "qwen2", micro_batch=4, steps=FEW),
    Case({"tensor": 2}, "llama-biases", micro_batch=4, steps=FEW),
    Case({"tensor": 2}, "qwen3-even", micro_batch=4, logits_held=64),
    Case({"tensor": 2}, "qwen3", micro_batch=4, steps=FEW),
    Case({"tensor": 2}, "latent-compressed", micro_batch=4, recomputed="selective", steps=FEW),
    Case({"pipeline": 2}),
    Case({"pipeline": 2}, "qwen3", micro_batch=1, recomputed="selective", steps=FEW),
    Case({"pipeline": 2, "pipeline_schedule": "interleaved-1f1b"}, "qwen3-deep", steps=FEW),
    Case({"pipeline": 2, "pipeline_schedule": "zero-bubble"}, "qwen3-deep"),
    Case({"pipeline": 2, "pipeline_schedule": "zero-bubble"}, "latent-deep", micro_batch=1, steps=FEW),
    Case({}, "latent-lora", steps=FEW),
    Case({"shard": 2}, "latent-lora", micro_batch=1, steps=FEW),
    Case({"expert": 2}, "latent-lora", steps=FEW),
    Case({"tensor": 2}, "latent-lora", micro_batch=4, steps=FEW),
    Case({"tensor": 2}, "qwen2-moe-lora", micro_batch=4, steps=FEW),
    Case({"pipeline": 2, "pipeline_schedule": "zero-bubble"}, "latent-deep-lora", steps=FEW),
    Case({"pipeline": 2}, "qwen3-deep-lora", steps=FEW),
    Case({"pipeline": 2, "pipeline_schedule": "zero-bubble"}, "qwen3-deep-lora", steps=FEW),
    Case({}, "latent-further", steps=FEW),
    Case({"expert": 2}, "latent-further", steps=FEW),
    Case({"expert": 2}, "latent-further-dense", steps=FEW),
    Case({"tensor": 2}, "latent-further-even", micro_batch=4, logits_held=64, steps=FEW),
    Case({"shard": 2}, "latent-further", recomputed="full", steps=FEW),
    # Muon computes in bf16: what is another sum in fp32 is soon another model.
    Case({"shard": 2}, "qwen3", steps=FEW, optimizer="muon"),
    Case({"expert": 2}, steps=FEW, optimizer="muon"),
    # The first stage has no experts.
    Case({"pipeline": 2}, steps=FEW, optimizer="muon"),
    Case({"pipeline": 2}, answers=True, steps=FEW),
    Case({"shard": 2}, answers=True, steps=FEW),
    Case({"pipeline": 2}, "latent-further", steps=FEW),
]
# Four processes: what the axes leave is `replicate`.
FOUR = [
    Case({}, steps=FEW),
    Case({"shard": 4}, micro_batch=1, steps=FEW),
    Case({"shard": 2}, steps=FEW),
    Case({"expert": 4}, steps=FEW),
    Case({"shard": 2, "expert": 2}, micro_batch=1, steps=5, kept=True),
    Case({"tensor": 2}, "qwen3-moe", steps=FEW),
    Case({"expert": 2, "tensor": 2}, micro_batch=4, steps=FEW),
    Case({"shard": 2, "tensor": 2}, "qwen3-even", steps=5, kept=True),
    Case({"shard": 2, "tensor": 2}, "latent-further-even", steps=FEW),
    Case({"shard": 2, "expert": 2}, "latent-lora", micro_batch=1, steps=FEW),
    Case({"shard": 2, "expert": 2}, "qwen2-moe-lora", micro_batch=1, steps=FEW),
    Case({"shard": 2, "tensor": 2}, "qwen3-even", steps=FEW, optimizer="muon"),
    Case({"shard": 2, "expert": 2}, micro_batch=1, steps=FEW, optimizer="muon"),
    Case({"pipeline": 2}, steps=FEW),
    Case({"pipeline": 4}, "qwen3-deep", steps=FEW),
    Case({"pipeline": 2, "tensor": 2}, "llama-biases", steps=FEW),
    Case({"pipeline": 2, "expert": 2, "pipeline_schedule": "interleaved-1f1b"}, "latent-deep", steps=FEW),
    Case({"pipeline": 2, "shard": 2, "pipeline_schedule": "zero-bubble"}, "qwen3-deep", steps=FEW),
    Case(
        {"pipeline": 2, "tensor": 2, "pipeline_schedule": "interleaved-1f1b"},
        "latent-deep",
        steps=FEW,
        recomputed="full",
    ),
    Case({"pipeline": 2, "shard": 2, "pipeline_schedule": "zero-bubble"}, "qwen3-deep", steps=FEW, optimizer="muon"),
    Case({"pipeline": 2, "tensor": 2}, "qwen3-even", answers=True, steps=FEW),
    Case({"pipeline": 2, "expert": 2}, "qwen3-moe", steps=FEW),
    Case({"pipeline": 2, "shard": 2}, "latent-further-tied", steps=FEW),
    Case({"pipeline": 2, "shard": 2, "pipeline_schedule": "zero-bubble"}, "latent-further-deep", steps=FEW),
    Case({"pipeline": 2, "tensor": 2}, "latent-deep-lora", steps=FEW),
    Case({"pipeline": 2, "tensor": 2}, "latent-further-even", answers=True, steps=FEW),
]
# Each takes over what the case of that number left after five steps; in the seventh the data begin once more.
# Both copies of tied weights lie in one process.
TIED: dict[str, object] = {"pipeline": 2, "pipeline_schedule": "zero-bubble"}
HALVES = [
    *(Case(mesh, steps=5, kept=True) for mesh in ({"shard": 2}, {"expert": 2}, {"tensor": 2}, {}, {"pipeline": 2})),
    Case(TIED, "qwen3-deep", steps=5, kept=True),
    Case({"shard": 2}, steps=1, optimizer="muon", kept=True),
    Case({"pipeline": 2}, "latent-lora", steps=5, kept=True),
    # Of this one three copies do: the head's and that of multi-token prediction.
    Case(TIED, "latent-further-deep", steps=5, kept=True),
    Case({}, "latent-further", steps=5, kept=True),
]
RESUMED = [
    Case({}, steps=7, resume=0),
    Case({"tensor": 2}, micro_batch=4, steps=7, resume=1),
    Case({"expert": 2}, steps=7, resume=2),
    Case({"shard": 2}, steps=7, resume=3),
    Case({"pipeline": 2}, steps=7, resume=0),
    Case({"expert": 2}, steps=7, resume=4),
    Case({"pipeline": 2}, resume=4),
    Case(TIED, "qwen3-deep", resume=5),
    Case({}, steps=FEW, resume=6, optimizer="muon"),
    Case({"expert": 2}, steps=FEW, resume=6, optimizer="muon"),
    Case({"pipeline": 2}, steps=FEW, resume=6, optimizer="muon"),
    Case({"tensor": 2}, "latent-lora", micro_batch=4, steps=7, resume=7),
    Case({"pipeline": 2}, "latent-lora", steps=7, resume=7),
    Case({"pipeline": 2}, "latent-further-deep", steps=7, resume=8),
    Case({"pipeline": 2}, "latent-further", steps=7, resume=9),
]
# The same on four.
HALVES_OF_FOUR = [case for case in FOUR if case.kept]
RESUMED_ON_FOUR = [
    Case({"expert": 2, "tensor": 2}, micro_batch=4, steps=7, resume=0),
    Case({"pipeline": 2, "shard": 2}, "qwen3-even", steps=7, resume=1),
]
# Traced by torch, of the second its gradients too; the code that comes of it is for test_compiled, in one process.
COMPILED = [
    Case({}, "qwen3", compiled="eager"),
    Case({"shard": 2}, "qwen3", compiled="aot_eager", recomputed="full"),
]
# Of some steps the last process's are slow.
SLOW = [
    Case({"shard": 2}, "qwen3", micro_batch=4, steps=2, slow="layers"),
    Case({"expert": 2}, micro_batch=4, steps=2, slow="layers"),
    Case({"tensor": 2}, "qwen3-even", micro_batch=8, steps=2, slow="layers"),
    Case({"pipeline": 2}, micro_batch=2, steps=2, slow="layers"),
    Case({"shard": 2}, "qwen3", micro_batch=4, steps=6, slow="optimizer", optimizer="muon"),
]
SPOILT = [Case({"pipeline": 2}, steps=4, spoilt=3)]
# As one of TWO but for the mistake and the steps. One step shows most of them.
WRONG = [
    Case({}, steps=1, mistake="the gradients are each process's own"),
    Case({"shard": 2}, micro_batch=4, steps=1, mistake="the gradients are summed, not averaged"),
    Case({"shard": 2}, micro_batch=4, steps=1, mistake="each process clips by the norm of its part"),
    Case(
        {"tensor": 2},
        "llama-biases",
        micro_batch=4,
        steps=1,
        mistake="parts of an output are not summed over tensor",
    ),
    Case(
        {"tensor": 2},
        "latent-compressed",
        micro_batch=4,
        recomputed="selective",
        steps=1,
        mistake="gradients of shares of the tokens are not summed over tensor",
    ),
    Case(
        {"tensor": 2},
        "llama-biases",
        micro_batch=4,
        steps=1,
        mistake="parts of the logits' gradient are not summed over tensor",
    ),
    Case({"expert": 2}, micro_batch=1, steps=2, mistake="each process counts its own tokens alone"),
    Case(
        {"tensor": 2},
        "qwen3-moe",
        micro_batch=4,
        steps=1,
        mistake="a sequence's tokens are not summed over tensor",
    ),
    *(
        Case(mesh, model, steps=1, mistake="the gradient of one micro-batch is missing")
        for mesh, model in (
            ({"pipeline": 2}, "latent"),
            ({"pipeline": 2, "pipeline_schedule": "interleaved-1f1b"}, "qwen3-deep"),
            ({"pipeline": 2, "pipeline_schedule": "zero-bubble"}, "qwen3-deep"),
        )
    ),
    Case({"pipeline": 2}, answers=True, steps=1, mistake="the pipeline's answers are not counted over the batch"),
    Case(
        {"pipeline": 2},
        "qwen3",
        micro_batch=1,
        recomputed="selective",
        steps=1,
        mistake="the copies of tied weights have gradients of their own",
    ),
    Case({"shard": 2}, "qwen3", steps=2, mistake="each part is orthogonalized", optimizer="muon"),
    Case(
        {"tensor": 2},
        "latent-lora",
        micro_batch=4,
        steps=1,
        mistake="the other factors' gradients are not summed over tensor",
    ),
]
# As one of FOUR.
WRONG_ON_FOUR = [
    Case({"shard": 2}, steps=1, mistake="the replicas' gradients are not summed"),
    Case({"shard": 2, "expert": 2}, micro_batch=1, steps=1, mistake="the experts' gradients are divided again"),
    Case(
        {"pipeline": 2, "shard": 2},
        "latent-further-tied",
        steps=1,
        mistake="the copies of tied weights have gradients of their own",
    ),
]
# Two replicas that meet after every fifth step: of one process, and of two that share the weights (every second).
APART = Case({}, micro_batch=4, inner_steps=5)
APART_AND_CUT = Case({"shard": 2}, micro_batch=2, steps=4, inner_steps=2)
APART_ON_ANSWERS = Case({}, micro_batch=4, inner_steps=5, answers=True)
ON_TWO = [*HALVES, *RESUMED, *TWO, *WRONG, APART, *COMPILED, *SLOW, APART_ON_ANSWERS, *SPOILT]
ON_FOUR = [*FOUR, *WRONG_ON_FOUR, *RESUMED_ON_FOUR, APART_AND_CUT]
_alone = functools.lru_cache(one_process.alone)


def alone(model: str, steps: int = meshes.STEPS, optimizer: str = "adamw", answers: bool = False) -> Result:
    """Returns what one process makes of the model in so many steps."""
    return _alone(model, steps, optimizer, answers)


def name_of(case: Case) -> str:
    sizes = (f"{axis}{size}" if isinstance(size, int) else str(size) for axis, size in case.mesh.items())
    mesh = "-".join(sizes) or "replicate"
    more = (f"-{case.mistake}" if case.mistake else "") + ("-muon" if case.optimizer == "muon" else "")
    more += "-answers" if case.answers else ""
    return f"{case.model}-{mesh}-{case.micro_batch}" + more


def launch(folder: Path, processes: int, cases: list[Case]) -> list[Result]:
    """Returns what each of ``cases`` gave on so many processes."""
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    work = functools.partial(meshes.work, folder / "cases.json", folder / "results.pt")
    forked.together(work, processes, folder)
    return [Result(**found) for found in torch.load(folder / "results.pt", weights_only=True)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return launch(tmp_path_factory.mktemp("two"), 2, ON_TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return launch(tmp_path_factory.mktemp("four"), 4, ON_FOUR)


def check_like(case: Case, result: Result) -> None:
    """Fails unless ``result`` is what one process makes of ``case``."""
    check_equal(result, alone(case.model, case.steps, case.optimizer, case.answers), leeway_of(case))


def leeway_of(case: Case) -> float:
    return 250 if case.optimizer == "muon" else 1


def check_equal(result: Result, expected: Result, leeway: float = 1) -> None:
    """Fails unless losses, norms, first gradients, statistics and samples are those of one process.

    Losses and norms of later steps may be off by ``leeway`` times what sums in another order come to.
    """
    assert result.samples == expected.samples
    assert result.losses == pytest.approx(expected.losses, rel=2e-6 * leeway)
    assert result.norms == pytest.approx(expected.norms, rel=1e-5 * leeway)
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        # Relative to the largest of the tensor: an element may be the rest of a sum that cancels.
        largest = gradient.abs().max().clamp(min=1e-12)
        torch.testing.assert_close(result.gradients[name] / largest, gradient / largest, atol=5e-6, rtol=0)
    check_weights(result, expected, leeway)
    assert result.valid_loss == pytest.approx(expected.valid_loss, rel=2e-6 * leeway)


def check_weights(result: Result, expected: Result, leeway: float = 1) -> None:
    assert result.weights.keys() == expected.weights.keys()
    for name, weights in expected.weights.items():
        # Adam makes steps of a gradient that is nothing but rounding, as that of a key's bias nearly is.
        torch.testing.assert_close(
            result.weights[name], weights, atol=2e-3 if leeway == 1 else 5e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", TWO, ids=name_of)
def test_two_processes_train_as_one_does(case: Case, two: list[Result]) -> None:
    check_like(case, two[ON_TWO.index(case)])


@pytest.mark.parametrize("case", FOUR, ids=name_of)
def test_four_processes_train_as_one_does(case: Case, four: list[Result]) -> None:
    check_like(case, four[ON_FOUR.index(case)])


@pytest.mark.parametrize("number", range(len(RESUMED)))
def test_a_checkpoint_of_one_mesh_goes_on_on_another(number: int, two: list[Result]) -> None:
    check_resumed(RESUMED[number], HALVES, two[ON_TWO.index(RESUMED[number])])


@pytest.mark.parametrize("number", range(len(RESUMED_ON_FOUR)))
def test_a_checkpoint_of_two_axes_goes_on_on_others(number: int, four: list[Result]) -> None:
    result = four[ON_FOUR.index(RESUMED_ON_FOUR[number])]
    check_resumed(RESUMED_ON_FOUR[number], HALVES_OF_FOUR, result)


def check_resumed(case: Case, halves: list[Case], result: Result) -> None:
    expected = alone(case.model, case.steps, case.optimizer)
    assert case.resume is not None
    assert result.losses == pytest.approx(expected.losses[halves[case.resume].steps :], rel=2e-6 * leeway_of(case))
    check_weights(result, expected, leeway_of(case))


@pytest.mark.parametrize("case", WRONG, ids=name_of)
def test_a_mistake_in_the_layout_is_seen(case: Case, two: list[Result]) -> None:
    check_seen(case, TWO, two[ON_TWO.index(case)])


@pytest.mark.parametrize("case", WRONG_ON_FOUR, ids=name_of)
def test_a_mistake_in_the_layout_of_four_is_seen(case: Case, four: list[Result]) -> None:
    check_seen(case, FOUR, four[ON_FOUR.index(case)])


def check_seen(case: Case, right: list[Case], result: Result) -> None:
    """Fails if ``result`` passes; that the same without the mistake does is a test for one of ``right``."""
    without = replace(case, mistake="")
    assert [other for other in right if replace(other, steps=case.steps, kept=False) == without]
    with pytest.raises(AssertionError):
        check_like(case, result)


def test_replicas_that_meet_now_and_then_do_what_the_paper_writes(two: list[Result], four: list[Result]) -> None:
    check_weights(two[ON_TWO.index(APART)], one_process.apart(APART, [[0], [1]]))
    check_weights(four[ON_FOUR.index(APART_AND_CUT)], one_process.apart(APART_AND_CUT, [[0, 1], [2, 3]]))
    check_weights(two[ON_TWO.index(APART_ON_ANSWERS)], one_process.apart(APART_ON_ANSWERS, [[0], [1]]))


@pytest.mark.parametrize("case", COMPILED, ids=name_of)
def test_compiled_layers_train_as_others_do(case: Case, two: list[Result]) -> None:
    result = two[ON_TWO.index(case)]
    check_equal(result, alone(case.model))
    # A layer's, in training and in validation, at least.
    assert result.graphs >= 2


@pytest.mark.parametrize("case", SLOW, ids=name_of)
def test_waiting_for_a_slower_process_is_time_for_communication(case: Case, two: list[Result]) -> None:
    result = two[ON_TWO.index(case)]
    assert result.slept >= case.steps
    waited = sum(seconds or 0.0 for seconds in result.waited)
    # The first one waits but for what it computes meanwhile.
    assert waited > 0.6 * result.slept * meshes.SLEEP


def test_compiled_layers_that_nothing_cuts_have_a_time_for_communication(two: list[Result]) -> None:
    assert None not in two[ON_TWO.index(COMPILED[1])].waited


def test_no_process_has_the_logits_of_all_words_or_tokens(two: list[Result]) -> None:
    whole, in_pieces = (case for case in TWO if case.model in ("qwen2", "qwen3-even") and "tensor" in case.mesh)
    words = meshes.MODELS["qwen2"].vocab_size // 2
    assert two[ON_TWO.index(whole)].logits == 4 * meshes.LENGTH * words
    assert two[ON_TWO.index(in_pieces)].logits == 64 // words * words


@pytest.mark.parametrize("case", [Case({"pipeline": 2}), Case(TIED, "qwen3-deep")], ids=name_of)
def test_a_pipeline_resumes_to_the_same_bits(case: Case, two: list[Result]) -> None:
    undisturbed = two[ON_TWO.index(case)]
    number = next(n for n, half in enumerate(HALVES) if (half.mesh, half.model) == (case.mesh, case.model))
    resumed = two[ON_TWO.index(replace(case, resume=number))]
    assert resumed.losses == undisturbed.losses[5:]
    assert all(torch.equal(resumed.weights[name], weights) for name, weights in undisturbed.weights.items())


def test_a_step_that_one_stage_spoils_is_skipped_by_all(two: list[Result]) -> None:
    spoilt = two[ON_TWO.index(SPOILT[0])]
    assert spoilt.skipped == [4, 4]
    check_weights(spoilt, alone("latent", 3))


def test_each_process_keeps_its_share_of_the_weights(four: list[Result]) -> None:
    share = {
        name_of(case): result.elements / alone(case.model, case.steps, case.optimizer, case.answers).elements
        for case, result in zip(FOUR, four, strict=False)
    }
    assert share["latent-shard4-1"] == pytest.approx(1 / 4, abs=0.02)
    assert share["latent-shard2-2"] == pytest.approx(1 / 2, abs=0.02)
    assert share["latent-shard2-expert2-1"] == pytest.approx(1 / 4, abs=0.02)
    assert share["qwen3-even-shard2-tensor2-2"] < 0.3
    assert share["latent-pipeline2-2"] < 0.6
    assert share["qwen3-deep-pipeline2-shard2-zero-bubble-2"] < 0.3


def test_how_fast_others_are_reached_is_measured_along_each_axis(four: list[Result]) -> None:
    links = {name_of(case): result.links for case, result in zip(ON_FOUR, four, strict=True)}
    assert links["latent-shard2-expert2-1"] == [("shard", 2), ("expert", 2)]
    assert links["qwen3-deep-pipeline2-shard2-zero-bubble-2"] == [("pipeline", 2), ("shard", 2)]


def test_each_process_reads_no_more_than_its_share(two: list[Result], four: list[Result]) -> None:
    pairs = [*zip(ON_TWO, two, strict=True), *zip(ON_FOUR, four, strict=True)]
    for case, result in pairs:
        assert bool(case.mesh) == bool(result.read), name_of(case)
        if not case.mesh:
            continue
        # Routers' biases beside the weights. LoRA's factors are there from the beginning.
        model = meshes.model_of(case)
        biases = sum(4 for router in model.routers() if router.e_score_correction_bias is not None)
        factors = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
        assert result.elements - factors <= result.read <= result.elements + biases, name_of(case)


def test_nobody_chooses_the_experts_that_the_uneven_model_leaves_idle() -> None:
    # Else the case above would not show what a process does that no token comes to.
    gradients = alone("latent-uneven", FEW).gradients["model.layers.1.mlp.experts.down_proj"]
    assert gradients[:2].abs().amax() > 0
    assert not gradients[2:].any()


@pytest.mark.parametrize(
    ("mesh", "changes", "reason"),
    [
        ({"shard": 3}, {}, "takes 3 processes or a multiple of that, and world_size is 2; set world_size to 3"),
        ({"replicate": 2, "shard": 2}, {}, "x replicate 2 is 4 processes, and world_size is 2; set world_size to 4"),
        ({"shard": 0}, {}, "train.mesh.shard: input should be greater than or equal to 1, found 0"),
        ({"pipe": 2}, {}, "train.mesh.pipe: unknown key"),
        ({"expert": 2}, {"train__model": tiny.LLAMA}, "this model has no layer with experts; set mesh.expert to 1"),
        ({"expert": 2}, {"train__model__n_routed_experts": 5}, "n_routed_experts 5 does not divide over mesh.expert 2"),
        (
            {"expert": 2},
            {"train__model": {**tiny.QWEN3_MOE, "num_experts": 5}},
            "num_experts 5 does not divide over mesh.expert 2",
        ),
        ({"tensor": 2}, {"train__model__num_attention_heads": 3}, "num_attention_heads 3 does not divide over mesh.t"),
        ({"tensor": 2}, {"train__model__intermediate_size": 49}, "intermediate_size 49 does not divide over mesh.t"),
        (
            {"tensor": 2},
            {"train__model": {**tiny.LLAMA, "num_key_value_heads": 1}},
            "num_key_value_heads 1 does not divide over mesh.tensor 2",
        ),
        (
            {"tensor": 2},
            {"train__model": {**tiny.QWEN3_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 17}},
            "shared_expert_intermediate_size 17 does not divide over mesh.tensor 2",
        ),
        (
            {"shard": 5, "expert": 2},
            {"train__world_size": 10, "train__global_batch": 20},
            "hidden_size 32 does not divide over mesh.shard 5, as it must with mesh.expert above 1",
        ),
        (
            {"tensor": 2},
            {"train__seq_len": 15},
            "seq_len 15 does not divide over mesh.tensor 2, which cuts tokens too; make it 14, or lower mesh.tensor",
        ),
        (
            {"tensor": 2},
            {"train__global_batch": 7},
            "7 is not a multiple of micro_batch 2 x world_size / (mesh.tensor x mesh.pipeline) 1; make it 6",
        ),
        (
            {"pipeline": 4},
            {"train__world_size": 4},
            "mesh.pipeline 4 makes 4 stages, and num_hidden_layers is 2; lower mesh.pipeline",
        ),
        (
            {"pipeline": 2, "pipeline_schedule": "zero-bubble"},
            {},
            "2 makes 4 stages, two a process with pipeline_schedule zero-bubble, and num_hidden_layers is 2",
        ),
        (
            {"pipeline": 2, "pipeline_schedule": "dapple"},
            {},
            "mesh.pipeline_schedule: input should be '1f1b', 'i",
        ),
        (
            {"pipeline": 2, "replicate": 2},
            {},
            "pipeline 2 x shard 1 x expert 1 x tensor 1 x replicate 2 is 4 processes, and world_size is 2",
        ),
        (
            {"pipeline": 2},
            {"train__micro_batch": 8},
            "global_batch makes 1 micro-batches for each pipeline, and mesh.pipeline 2 takes as many or more",
        ),
        (
            {"pipeline": 2, "pipeline_schedule": "interleaved-1f1b"},
            {"train__global_batch": 6},
            "3 micro-batches for each pipeline, and pipeline_schedule interleaved-1f1b takes a multiple of mesh.pip",
        ),
        (
            {"pipeline": 2, "pipeline_schedule": "zero-bubble"},
            {"train__activation_checkpointing": "full", "train__model__num_hidden_layers": 4},
            "activation_checkpointing full keeps nothing for the second; set that to none, or take 1f1b",
        ),
    ],
)
def test_an_impossible_mesh_is_one_line_with_its_reason(
    mesh: dict[str, object], changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    # `python -m tasks.train` reads its section before it starts a process: see test_train.
    tiny.write_params(tmp_path, train__mesh=mesh, **changes)
    with pytest.raises(BadParameter) as refused:
        read_section("train", TrainParams, tmp_path / "params.yaml")
    assert reason in str(refused.value)


def test_experts_may_be_those_of_multi_token_prediction_alone(tmp_path: Path) -> None:
    shape = {"train__model__first_k_dense_replace": 2, "train__model__num_nextn_predict_layers": 1}
    tiny.write_params(tmp_path, train__mesh={"expert": 2}, **shape)
    assert read_section("train", TrainParams, tmp_path / "params.yaml").layout.expert == 2
    tiny.write_params(tmp_path, train__mesh={"expert": 2}, **shape, train__mtp_loss_weight=0.0)
    with pytest.raises(BadParameter, match="this model has no layer with experts; "):
        read_section("train", TrainParams, tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("sizes", "parts", "lengths"),
    [
        ([1.0] * 8, 4, [2, 2, 2, 2]),
        # A head as large as three layers, an embedding as large as one.
        ([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0], 3, [3, 4, 1]),
        ([9.0, 1.0, 1.0, 1.0], 2, [1, 3]),
        ([1.0, 1.0, 1.0], 3, [1, 1, 1]),
    ],
)
def test_stages_are_cut_so_that_the_largest_is_small(sizes: list[float], parts: int, lengths: list[int]) -> None:
    cut = balanced(sizes, parts)
    assert [len(some) for some in cut] == lengths
    assert [layer for some in cut for layer in some] == list(range(len(sizes)))


def test_a_large_vocabulary_takes_layers_off_the_last_stage() -> None:
    config = meshes.MODELS["latent-deep"]
    small, large = (LanguageModel(config.model_copy(update={"vocab_size": size})) for size in (8, 600))
    assert stages_of(small, 2) == [range(2), range(2, 4)]
    assert stages_of(large, 2) == [range(3), range(3, 4)]


def test_what_goes_wrong_in_a_stage_is_told_as_it_is() -> None:
    lost = RuntimeError("gloo/transport: connection closed")
    with pytest.raises(RuntimeError, match="connection closed"), cause_told():
        raise RuntimeError("stage 1 failed to run forward") from lost
    with pytest.raises(RuntimeError, match="of its own"), cause_told():
        raise RuntimeError("of its own")
