"""A turned model computes what it did, and its channels are alike."""

from dataclasses import replace

import pytest
import torch
from odd import make_grouped, make_model

from lm.feed_forward import Experts
from lm.model import LanguageModel
from lm.quantization import PLANS, Plan, layers, prepare
from lm.rotation import orthogonal, rotate, turn_hidden


def _unlike_norms(model: LanguageModel) -> LanguageModel:
    """Norms with weights that differ, some of them large and negative: what is forgotten to be folded shows."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5)
    return model


@pytest.mark.parametrize("size", [1, 2, 20, 48, 63])
def test_the_turn_is_orthogonal_and_spreads_each_channel_over_all(size: int) -> None:
    turn = orthogonal(size)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64))
    assert turn.abs().max() <= (2 / size) ** 0.5 + 1e-12
    torch.testing.assert_close(turn, orthogonal(size), rtol=0, atol=0)


@torch.no_grad()
def test_every_family_computes_what_it_did(model: LanguageModel, ids: torch.Tensor) -> None:
    expected = _unlike_norms(model)(ids)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    turned = rotate(model)(ids)
    torch.testing.assert_close(turned, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    kept = {
        name for name, parameter in model.named_parameters() if name in before and torch.equal(parameter, before[name])
    }
    # What neither reads a turned space nor writes into one.
    biases = tuple(f"{name}_proj.bias" for name in ("q", "k", "gate", "up"))
    assert all(name.endswith(("q_norm.weight", "k_norm.weight", *biases)) for name in kept), kept


@torch.no_grad()
def test_large_channels_cost_less_once_they_are_spread(ids: torch.Tensor) -> None:
    def with_large_channels() -> LanguageModel:
        model = make_grouped()
        for block in model.model.layers:
            block.input_layernorm.weight[5] *= 40
            block.post_attention_layernorm.weight[11] *= 40
        return model

    expected = with_large_channels()(ids)
    plain, turned = (
        (prepare(model, PLANS["per-token-8"])(ids) - expected).square().mean()
        for model in (with_large_channels(), rotate(with_large_channels()))
    )
    assert turned < 0.5 * plain


def _turned(model: LanguageModel, plan: Plan) -> dict[str, int]:
    """The layers of ``model`` that turn what they read, each with the turn's width, after :func:`turn_hidden`."""
    turn_hidden(model, plan)
    turns = {name: getattr(layer, "turn", None) for name, layer in layers(model).items()}
    return {name: len(turn) for name, turn in turns.items() if turn is not None}


@torch.no_grad()
def test_a_turn_while_the_model_runs_changes_nothing_in_float(model: LanguageModel, ids: torch.Tensor) -> None:
    expected = model(ids)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    turned = _turned(model, PLANS["per-token-8"])
    torch.testing.assert_close(model(ids), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert set(turned) == {name for name in layers(model) if name.endswith((".down_proj", ".experts"))}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".down_proj" in name and not name.endswith(".bias")}
    assert not [name for name in model.state_dict() if name.endswith("turn")]


def test_what_is_turned_while_the_model_runs_is_rounded_and_not_of_experts_in_one_node() -> None:
    def make() -> LanguageModel:
        return make_model(intermediate_size=260, moe_intermediate_size=254, n_shared_experts=1)

    # The largest divisors up to 128.
    first, shared, experts = (f"model.layers.{part}" for part in ("0.mlp", "1.mlp.shared_experts", "1.mlp.experts"))
    found = _turned(make(), PLANS["per-token-8"])
    assert found[f"{first}.down_proj"] == 65
    assert found[f"{shared}.down_proj"] == found[experts] == 127
    assert _turned(make(), PLANS["static-8"]) == found
    dense = {name: width for name, width in found.items() if not name.endswith(".experts")}
    assert _turned(make(), PLANS["blockwise-8-wide"]) == _turned(make(), PLANS["blockwise-4"]) == dense
    # A float layer has nothing to win; a prime number has no narrow turn.
    in_float = Plan(PLANS["per-token-8"].others, PLANS["per-token-8"].head, ("*.experts", "model.layers.0.*"))
    float_now = {name for name in found if name.endswith(".experts") or name.startswith("model.layers.0.")}
    assert _turned(make(), in_float).keys() == found.keys() - float_now
    assert not _turned(make_grouped(intermediate_size=131), PLANS["per-token-8"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "plan"), [(make_model, "per-token-8"), (make_grouped, "per-token-8"), (make_grouped, "blockwise-8-wide")]
)
def test_large_hidden_values_cost_less_once_they_are_turned(
    make: type[LanguageModel], plan: str, ids: torch.Tensor
) -> None:
    def with_large_values() -> LanguageModel:
        model = make(intermediate_size=128)
        for block in model.model.layers:
            mlp = block.mlp if hasattr(block.mlp, "up_proj") else block.mlp.shared_experts
            mlp.up_proj.weight[3] *= 60
            mlp.down_proj.weight[:, 3] /= 60
            if isinstance(experts := getattr(block.mlp, "experts", None), Experts):
                experts.gate_up_proj[:, -3] *= 60
                experts.down_proj[:, :, -3] /= 60
        return model

    # Attention has losses of its own.
    alone, expected = replace(PLANS[plan], in_float=("*.self_attn.*", "lm_head")), with_large_values()(ids)
    plain, turned = (
        (prepare(model, alone)(ids) - expected).square().mean()
        for model in (with_large_values(), turn_hidden(with_large_values(), alone))
    )
    assert turned < 0.5 * plain
