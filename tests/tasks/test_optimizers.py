"""Muon moves matrices, each expert's as its own, and AdamW the rest; a resumed optimizer goes on as if nothing was."""

import io
from collections.abc import Callable
from pathlib import Path

import odd
import pytest
import tiny
import torch
from torch import nn

from lm.model import LanguageModel
from tasks.optimizers import StackedMuon, Together, make_optimizer, orthogonalized
from tasks.train.params import TrainParams


@pytest.fixture
def muon(tmp_path: Path) -> TrainParams:
    return tiny.train_params(
        tmp_path, train__optimizer="muon", train__muon_learning_rate=0.02, train__learning_rate=0.005
    )


def small_model() -> LanguageModel:
    return odd.make_model().train()


def take_steps(model: LanguageModel, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        ids = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(step))
        model.loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("rows", "columns"), [(24, 10), (10, 24), (16, 16)])
def test_each_matrix_of_a_stack_moves_as_torch_moves_it_alone(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, rows, columns, generator=generator)
    stack = nn.Parameter(start.clone())
    alone = [nn.Parameter(matrix.clone()) for matrix in start]
    mine = StackedMuon([stack], lr=0.1, weight_decay=0.3)
    theirs = torch.optim.Muon(alone, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        grad = torch.randn(start.shape, generator=generator)
        stack.grad = grad
        for parameter, part in zip(alone, grad, strict=True):
            parameter.grad = part.clone()
        mine.step()
        theirs.step()
    # Both iterate in bf16, whose rounding the order of a sum decides.
    torch.testing.assert_close(stack.detach(), torch.stack([one.detach() for one in alone]), rtol=0, atol=5e-3)
    assert (stack.detach() - start).abs().mean() > 0.05


def test_singular_values_come_near_one_matrix_by_matrix() -> None:
    # Of sizes that are thousands apart: a norm over the whole stack would leave the small one as it is.
    matrices = (
        torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    )
    found = torch.linalg.svdvals(orthogonalized(matrices).float())
    assert found.min() > 0.5
    assert found.max() < 1.3


@pytest.mark.parametrize("make", [small_model, odd.make_gated_mixture])
def test_embedding_head_norms_and_routers_stay_with_adamw(make: Callable[[], LanguageModel], muon: TrainParams) -> None:
    model = make()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, muon)
    by_rate = {
        rate: {
            names[id(one)] for group in optimizer.param_groups if group["initial_lr"] == rate for one in group["params"]
        }
        for rate in (0.005, 0.02)
    }
    assert by_rate[0.005] | by_rate[0.02] == set(names.values())
    assert by_rate[0.005] == {
        name
        for name in names.values()
        if name.endswith(("norm.weight", "gate.weight", "bias")) or "embed" in name or "head" in name
    }
    assert any("experts.gate_up_proj" in name for name in by_rate[0.02])


def test_a_stage_without_anything_to_train_has_as_many_groups_as_the_others(muon: TrainParams) -> None:
    # As where LoRA's targets lie in other stages: all go on from the settings that the first one has kept.
    stages = [odd.make_model(), odd.make_model()]
    stages[1].requires_grad_(False)
    groups = [make_optimizer(stage, muon).param_groups for stage in stages]
    assert len(groups[0]) == len(groups[1])
    assert not any(group["params"] for group in groups[1])


def test_a_tied_head_is_an_embedding(muon: TrainParams) -> None:
    model = odd.make_grouped(tie_word_embeddings=True)
    optimizer = make_optimizer(model, muon)
    fast = {id(one) for group in optimizer.param_groups if group["initial_lr"] == 0.02 for one in group["params"]}
    assert id(model.model.embed_tokens.weight) not in fast


def test_a_rate_that_is_set_on_the_whole_is_the_one_that_is_taken(muon: TrainParams) -> None:
    model = small_model()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = make_optimizer(model, muon)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(model, optimizer, 0, 1)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_optimizer_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    params = tiny.train_params(tmp_path, train__optimizer=kind)
    model = small_model()
    optimizer = make_optimizer(model, params)
    take_steps(model, optimizer, 0, 2)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    take_steps(model, optimizer, 2, 4)

    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    again = small_model()
    again.load_state_dict(state["model"])
    resumed = make_optimizer(again, params)
    resumed.load_state_dict(state["optimizer"])
    take_steps(again, resumed, 2, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_muon_s_state_is_smaller_than_adamw_s(muon: TrainParams, tmp_path: Path) -> None:
    sizes = []
    for params in (muon, tiny.train_params(tmp_path, train__optimizer="adamw")):
        model = small_model()
        optimizer = make_optimizer(model, params)
        take_steps(model, optimizer, 0, 1)
        sizes.append(sum(value.numel() for state in optimizer.state.values() for value in state.values()))
    assert isinstance(make_optimizer(small_model(), muon), Together)
    assert sizes[0] < 0.7 * sizes[1]
