"""Rounding that makes up for itself: nearer to float than the nearest level, on the same levels, always the same."""

import weakref
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from graphs import CALIBRATION
from odd import make_grouped, make_model

from lm.blockwise import fake_quant_weight
from lm.compensation import compensate, compensated
from lm.model import LanguageModel
from lm.per_token import fake_quant_rows
from lm.quantization import PLANS, Plan, layers, prepare
from lm.scheme import Float, Levels

KINDS = {
    "rows": (Levels(127, None), fake_quant_rows),
    "blocks of 8 bits": (Levels(127, 64), lambda weight: fake_quant_weight(weight, 8, 64)),
    "blocks of 4 bits": (Levels(7, 32), lambda weight: fake_quant_weight(weight, 4, 32)),
}


def _inputs(width: int) -> torch.Tensor:
    """Inputs whose channels depend on each other, as those of a layer do."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(400, 12, generator=generator) @ torch.randn(12, width, generator=generator) + 0.1 * torch.randn(
        400, width, generator=generator
    )


@pytest.mark.parametrize(("levels", "nearest"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("width", [20, 110])
def test_the_product_is_nearer_and_the_weight_lies_on_its_levels(
    levels: Levels, nearest: Callable[[torch.Tensor], torch.Tensor], width: int
) -> None:
    x = _inputs(width)
    weight = torch.randn(30, width, generator=torch.Generator().manual_seed(9))
    weight[4] = 0.0
    found = compensated(weight, (x.T @ x).double(), levels)
    error, plain = ((one - weight) @ x.T for one in (found, nearest(weight)))
    assert error.norm() < 0.7 * plain.norm()
    # Rounded again it is what it was.
    torch.testing.assert_close(nearest(found), found, rtol=1e-6, atol=0)
    assert (found[4] == 0).all()


def test_weights_that_met_nothing_are_rounded_to_the_nearest_level() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(9))
    found = compensated(weight, torch.zeros(40, 40, dtype=torch.float64), Levels(7, 32))
    torch.testing.assert_close(found, fake_quant_weight(weight, 4, 32))


@torch.no_grad()
@pytest.mark.parametrize("make", [make_model, make_grouped])
def test_a_whole_model_comes_nearer_to_float(make: Callable[[], LanguageModel]) -> None:
    def dependent() -> LanguageModel:
        # A residual stream of few dimensions and a little more, as language makes it.
        model = make()
        generator = torch.Generator().manual_seed(11)
        table = model.model.embed_tokens.weight
        table.copy_(
            torch.randn(len(table), 5, generator=generator) @ torch.randn(5, table.shape[1], generator=generator)
        )
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter *= 0.1
        return model

    # Other tokens than those that were looked at.
    ids = torch.randint(0, 100, (4, 24), generator=torch.Generator().manual_seed(10))
    plan = PLANS["blockwise-4"]
    expected = dependent()(ids)
    plain, found = (
        float((model.eval()(ids) - expected).square().mean())
        for model in (prepare(dependent(), plan), compensate(dependent(), plan, CALIBRATION))
    )
    assert found < 0.5 * plain


@torch.no_grad()
@pytest.mark.parametrize("routers", ["float", "int8"])
def test_every_layer_is_rounded_but_those_that_stay_float(routers: Literal["float", "int8"]) -> None:
    four = PLANS["blockwise-4"].others
    plan = Plan(four, four if routers == "int8" else Float(), ("*.o_proj", "lm_head"), routers=routers)
    model, before = make_model(), dict(make_model().named_parameters())
    compensate(model, plan, CALIBRATION)
    for name, layer in layers(model).items():
        for part, weight in layer.named_parameters():
            same = torch.equal(weight, before[f"{name}.{part}"])
            in_float = ("o_proj", "lm_head", "mlp.gate") if routers == "float" else ("o_proj", "lm_head")
            assert same == name.endswith(in_float), name
            if not same:
                torch.testing.assert_close(fake_quant_weight(weight.flatten(0, -2), 4, 32), weight.flatten(0, -2))


@torch.no_grad()
def test_a_tied_head_leaves_the_embedding_alone() -> None:
    model, before = make_grouped(tie_word_embeddings=True), make_grouped(tie_word_embeddings=True)
    compensate(model, PLANS["blockwise-4"], CALIBRATION)
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


@torch.no_grad()
def test_rounding_twice_gives_the_same_bits() -> None:
    one, other = (compensate(make_model(), PLANS["blockwise-4"], CALIBRATION).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_logits_of_one_window_are_there_at_a_time() -> None:
    model, made, living = make_model(), [], []

    def seen(_: object, __: object, logits: torch.Tensor) -> None:
        living.append(sum(earlier() is not None for earlier in made))
        made.append(weakref.ref(logits))

    model.lm_head.register_forward_hook(seen)
    compensate(model, PLANS["blockwise-8"], CALIBRATION)
    assert living == [0] * len(CALIBRATION)


def test_no_token_is_counted_for_the_balance_of_experts() -> None:
    model = compensate(make_model(), PLANS["blockwise-8"], CALIBRATION)
    assert all(router.tokens_per_expert.sum() == 0 for router in model.routers())
    assert model.training
