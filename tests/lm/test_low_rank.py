"""Low-rank factors: what they compute, what is trained of an adapted model, and what peft makes of what is written."""

import errno
import fnmatch
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from odd import make_gated_mixture, make_grouped, make_grouped_mixture, make_model, write_checkpoint
from safetensors.torch import load_file

from lm import feed_forward, hugging_face, layer_names, low_rank
from lm.model import LanguageModel
from lm.weights import held_by

IDS = torch.arange(24).view(2, 12) * 7 % 101


def adapted(model: LanguageModel, *targets: str) -> LanguageModel:
    """``model`` with factors that are all random: those that begin as zero too."""
    low_rank.adapt(model, targets, rank=3, alpha=7.5, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("make", [make_grouped, make_model])
def test_factors_begin_without_an_effect_and_nothing_else_learns(make: type[LanguageModel]) -> None:
    expected, model = make()(IDS), make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    low_rank.adapt(model, ["*_proj"], rank=3, alpha=6, seed=5)
    assert torch.equal(model(IDS), expected)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    for _ in range(2):
        model.loss(IDS).backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if name not in before or (value != before[name]).any()}
    assert moved - {name for name in moved if name.endswith(("lora_A", "lora_B"))} <= {
        name for name in before if name.endswith("tokens_per_expert")
    }
    assert len(optimizer.state) == len([name for name in moved if "lora_" in name]) > 0
    assert (model(IDS) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("make", [make_grouped, make_model])
def test_merged_weights_compute_what_the_factors_did(make: type[LanguageModel]) -> None:
    # Some layers of a product that is taken together, and not the others.
    model = adapted(make(), "q_proj", "*.1.*up_proj", "o_proj", "*.2.*down_proj")
    expected = model(IDS)
    assert (expected - make()(IDS)).abs().max() > 0.1
    torch.testing.assert_close(merged(model)(IDS), expected, atol=1e-5, rtol=1e-5)


def merged(model: LanguageModel) -> LanguageModel:
    plain, whole = LanguageModel(model.config), low_rank.merged(model, held_by(model))
    plain.load_state_dict({name: whole(name) for name in plain.state_dict()})
    return plain


@pytest.mark.parametrize(
    ("targets", "said"),
    [(["q_proj", "w1"], "no layer is named w1; those that"), (["lm_head"], "lm_head"), (["gate"], "named gate;")],
)
def test_a_pattern_that_matches_no_layer_is_named(targets: list[str], said: str) -> None:
    names = layer_names.adaptable(make_model().config)
    with pytest.raises(ValueError, match=said):
        layer_names.chosen(names, targets)


@pytest.mark.parametrize("make", [make_model, make_grouped, make_grouped_mixture, make_gated_mixture])
def test_names_are_known_without_a_model(make: Callable[[], LanguageModel]) -> None:
    model = make()
    low_rank.adapt(model, ["*"], rank=2, alpha=4, seed=5)
    assert sorted(low_rank._adapted(model)) == sorted(layer_names.adaptable(model.config))


def test_patterns_choose_by_the_last_part_or_the_whole_name() -> None:
    names = layer_names.adaptable(make_model().config)
    assert layer_names.chosen(names, ["kv_*"]) == [name for name in names if ".kv_" in name]
    assert layer_names.chosen(names, ["*.2.mlp.*", "o_proj"]) == [
        name for name in names if fnmatch.fnmatch(name, "*.2.mlp.*") or name.endswith("o_proj")
    ]


@pytest.mark.parametrize("grouped", [True, False])
def test_routed_experts_have_factors_of_their_own(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 48, "moe_intermediate_size": 24}
    plain = make_model(**sizes)
    low_rank.adapt(plain, ["*.mlp.experts.*"], rank=8, alpha=12, seed=5)
    learning = {name: value for name, value in plain.named_parameters() if value.requires_grad}
    assert {name: tuple(value.shape) for name, value in learning.items()} == {
        f"model.layers.{layer}.mlp.experts.{beside}.{side}": size
        for layer in (1, 2)
        for beside, side, size in (
            ("beside_in", "lora_A", (8, 8, 48)),
            ("beside_in", "lora_B", (8, 48, 8)),
            ("beside_out", "lora_A", (8, 8, 24)),
            ("beside_out", "lora_B", (8, 48, 8)),
        )
    }
    generator = torch.Generator().manual_seed(6)
    experts = plain.model.layers[1].mlp.experts
    with torch.no_grad():
        for value in learning.values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    x = torch.randn(9, 48, generator=generator)
    # Two experts a token; nobody chooses the last.
    chosen = torch.stack([torch.randperm(7, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator)
    if grouped:
        monkeypatch.setattr(feed_forward, "GROUPED_ON", {"cpu"})
        monkeypatch.delattr(feed_forward.Experts, "one_by_one")
    with torch.autocast("cpu", torch.bfloat16, enabled=grouped):
        y = experts(x, chosen, weights)
    (y.float() * x).sum().backward()
    found = {name: value.grad.clone() for name, value in experts.named_parameters() if value.requires_grad}
    monkeypatch.undo()

    experts.zero_grad()
    effective = [
        weight.detach() + 1.5 * factors.lora_B @ factors.lora_A
        for weight, factors in (
            (experts.gate_up_proj, experts.beside_in), (experts.down_proj, experts.beside_out),
        )
    ]  # fmt: skip
    expected = torch.zeros(9, 48)
    for token in range(9):
        for place, expert in enumerate(chosen[token].tolist()):
            gate, up = (effective[0][expert] @ x[token]).chunk(2)
            expected[token] += weights[token, place] * (effective[1][expert] @ (torch.nn.functional.silu(gate) * up))
    close = {"atol": 0.05, "rtol": 0.05} if grouped else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(y.float(), expected, **close)
    (expected * x).sum().backward()
    for name, value in experts.named_parameters():
        if value.requires_grad:
            largest = value.grad.abs().max()
            torch.testing.assert_close(found[name] / largest, value.grad / largest, **close)
            assert not value.grad[7].any()


def test_peft_computes_with_the_written_factors_what_the_model_does(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = IDS % tiny.VOCAB
    some = ["[qko]*_proj*", "down_proj", "*.2.*.gate*_proj"]
    for name, make, targets in (
        ("grouped", make_grouped, ["*_proj"]),
        ("latent", make_model, some),
        ("grouped-mixture", make_grouped_mixture, some),
        ("gated-mixture", make_gated_mixture, [*some, "shared_expert_gate"]),
    ):
        base = tmp_path / name
        model = adapted(write_checkpoint(base, make), *targets)
        low_rank.save(model, held_by(model), base / "adapter")
        again = tmp_path / f"{name}-again"
        low_rank.save(model, held_by(model), again)
        assert tiny.files_of(again) == tiny.files_of(base / "adapter")
        written = load_file(base / "adapter" / low_rank.WEIGHTS)
        assert written.keys() >= {
            f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"
        }
        assert json.loads((base / "adapter" / low_rank.CONFIG).read_text())["r"] == 3

        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, experts_implementation="eager"), base / "adapter"
        ).eval()
        merged_by_peft = theirs.merge_and_unload()
        with torch.no_grad():
            expected = model(ids)
            torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)
            (tmp_path / f"{name}-merged").mkdir()
            hugging_face.save(merged(model), base / "tokenizer.json", tmp_path / f"{name}-merged")
            ours = AutoModelForCausalLM.from_pretrained(
                tmp_path / f"{name}-merged", experts_implementation="eager"
            ).eval()
            torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(merged_by_peft(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_disk_without_room_for_factors_is_told_as_one(
    tmp_path: Path, small_disk: Callable[[Path, int], None]
) -> None:
    small_disk(tmp_path / "disk", 4)
    model = adapted(write_checkpoint(tmp_path / "base", make_grouped), "*_proj")
    with pytest.raises(OSError, match="No space left on device") as told:
        low_rank.save(model, held_by(model), tmp_path / "disk/adapter")
    assert told.value.errno == errno.ENOSPC
