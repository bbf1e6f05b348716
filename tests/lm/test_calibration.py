"""Fixed ranges: as good as a search over exact values finds them, one a product, the model left as it was."""

import pytest
import torch
from odd import make_grouped, make_model

from lm.calibration import best_range, buckets, calibrate
from lm.feed_forward import Experts, Router
from lm.model import LanguageModel
from lm.quantization import PLANS, layers, prepare
from lm.static import Range, fake_quant_within

STATIC = PLANS["static-8"]
WINDOWS = torch.randint(0, 100, (6, 24), generator=torch.Generator().manual_seed(8))


def _error(x: torch.Tensor, within: Range) -> float:
    return float((fake_quant_within(x, within) - x).double().square().sum())


def _range_of(x: torch.Tensor) -> Range:
    return best_range(torch.bincount(buckets(x), minlength=2**16))


VALUES = {
    "normal": lambda x: x,
    # Clipped, so rare are they; in the next case they are too large to be.
    "two outside": lambda x: torch.cat([x.repeat(60), torch.tensor([9.0, -9.0])]),
    "two far outside": lambda x: torch.cat([x, torch.tensor([90.0, -40.0])]),
    "one side": lambda x: x.abs() * 1e-3,
    "heavy tails": lambda x: x * (x.abs() * 1.5).exp(),
    "negative": lambda x: -x.exp(),
}


@pytest.mark.parametrize("values", VALUES)
def test_no_other_range_loses_much_less(values: str) -> None:
    x = VALUES[values](torch.randn(5000, generator=torch.Generator().manual_seed(1)))
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shares = [0.9**index for index in range(10)]
    least = min(_error(x, Range.over(low * one, high * other)) for one in shares for other in shares)
    found = _error(x, _range_of(x))
    assert found < 1.05 * least
    if values == "two outside":
        assert found < 0.6 * _error(x, Range.over(low, high))


def test_values_that_are_all_zero_stay_zero() -> None:
    x = torch.zeros(9)
    assert (fake_quant_within(x, _range_of(x)) == 0).all()


@torch.no_grad()
def test_each_product_has_the_range_of_what_it_multiplies_and_the_model_is_left_alone() -> None:
    model = make_model()
    expected = model(WINDOWS)
    plan = calibrate(model, STATIC, WINDOWS)
    assert torch.equal(model(WINDOWS), expected)
    names = {name for name, layer in layers(model).items() if not isinstance(layer, Router)}
    experts = {name for name, layer in layers(model).items() if isinstance(layer, Experts)}
    assert experts == {"model.layers.1.mlp.experts", "model.layers.2.mlp.experts"}
    parts = {f"{name}.{part}" for name in experts for part in ("gate_up_proj", "down_proj")}
    assert plan.ranges.keys() == names - experts | parts
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(WINDOWS)
    assert plan.ranges["lm_head"] == _range_of(seen[0])
    # What reads the same values is quantized once.
    assert plan.of("model.layers.0.mlp.gate_proj") is plan.of("model.layers.0.mlp.up_proj")
    # The two parts of an expert read different ones.
    one, other = (plan.ranges[f"model.layers.1.mlp.experts.{part}"] for part in ("gate_up_proj", "down_proj"))
    assert one != other


@torch.no_grad()
@pytest.mark.parametrize("make", [make_model, make_grouped])
def test_what_is_clipped_and_rounded_leaves_the_model_near_to_float(make: type[LanguageModel]) -> None:
    expected, ids = make()(WINDOWS), WINDOWS
    plan = calibrate(make(), STATIC, ids)
    near, dynamic = (prepare(make(), one)(ids) for one in (plan, PLANS["per-token-8"]))
    assert (near - expected).norm() < 0.2 * expected.norm()
    assert (near - expected).norm() > (dynamic - expected).norm()


def test_layers_that_stay_float_and_other_schemes_get_no_ranges() -> None:
    model = make_model()
    assert calibrate(model, PLANS["per-token-8"], WINDOWS) is PLANS["per-token-8"]
    plan = calibrate(model, type(STATIC)(STATIC.others, STATIC.head, ("*.experts", "lm_head")), WINDOWS)
    assert not [name for name in plan.ranges if "mlp.experts" in name or name == "lm_head"]
    assert "model.layers.1.mlp.shared_experts.down_proj" in plan.ranges


def test_a_plan_without_its_ranges_multiplies_nothing() -> None:
    with pytest.raises(ValueError, match="no ranges yet"):
        prepare(make_model(), STATIC)(WINDOWS)
