"""Activation checkpointing changes what is kept, and neither a gradient nor a router's count."""

from collections.abc import Callable

import odd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lm.model import LanguageModel
from tasks.recomputation import Recomputation, recompute


def step(make: Callable[[], LanguageModel], which: Recomputation) -> tuple[LanguageModel, dict[str, int], int]:
    """Returns the model after one backward pass, how often each operator ran, and the bytes kept for that pass."""
    model = make().train()
    recompute(model, which)
    ids = torch.randint(0, 100, (2, 33), generator=torch.Generator().manual_seed(0))
    ran: dict[str, int] = {}
    kept: dict[int, int] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), more=None):  # type: ignore[no-untyped-def]
            ran[str(operator)] = ran.get(str(operator), 0) + 1
            return operator(*arguments, **(more or {}))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with Count():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(ids)
        loss.backward()
    return model, ran, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("make", [odd.make_model, odd.make_grouped])
@pytest.mark.parametrize("which", ["selective", "full"])
def test_gradients_and_counts_are_the_same_to_the_bit(which: Recomputation, make: Callable[[], LanguageModel]) -> None:
    plain, _, _ = step(make, "none")
    model, _, _ = step(make, which)
    expected = dict(plain.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name].grad), name  # type: ignore[arg-type]
    for router, other in zip(model.routers(), plain.routers(), strict=True):
        assert torch.equal(router.tokens_per_expert, other.tokens_per_expert)
        assert router.tokens_per_expert.sum() == 2 * 32 * router.config.num_experts_per_tok
        assert router.counts


def test_full_computes_the_products_again_and_selective_only_what_is_cheap() -> None:
    runs = {which: step(odd.make_grouped, which) for which in ("none", "selective", "full")}  # type: ignore[arg-type]
    products = {which: ran["aten.mm.default"] for which, (_, ran, _) in runs.items()}
    gates = {which: ran["aten.silu.default"] for which, (_, ran, _) in runs.items()}
    assert products["none"] == products["selective"] < products["full"]
    assert gates["none"] < gates["selective"] == gates["full"]


def test_a_layer_keeps_its_input_alone() -> None:
    # torch's checkpoint packs what a layer would keep out of sight of these hooks, so what they see is what stays.
    plain, full = step(odd.make_model, "none")[2], step(odd.make_model, "full")[2]
    assert full < 0.4 * plain
