"""A turned model computes what it did, and its channels are alike."""

import pytest
import torch
from odd import make_grouped

from lm.model import LanguageModel
from lm.quantization import PLANS, prepare
from lm.rotation import orthogonal, rotate


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
    assert all(name.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias")) for name in kept), kept


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
