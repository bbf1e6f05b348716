"""Routing and experts against one token at a time."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from lm import feed_forward
from lm.config import LatentConfig
from lm.dispatch import ROWS, Rows, combined, counted, dealt, rows_by_pair, rows_by_row
from lm.feed_forward import Experts, MixtureOfExperts, Router, gated
from lm.model import LanguageModel


def _mixtures(model: LanguageModel) -> list[MixtureOfExperts]:
    return [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MixtureOfExperts)]


def test_experts_equal_one_token_at_a_time(model: LanguageModel) -> None:
    for mixture in _mixtures(model):
        x = torch.randn(19, mixture.gate.config.hidden_size, generator=torch.Generator().manual_seed(6))
        chosen, weights = mixture.gate(x)
        expected = torch.stack([_one(mixture.experts, *token) for token in zip(x, chosen, weights, strict=True)])
        torch.testing.assert_close(mixture.experts(x, chosen, weights), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lay_out", [rows_by_pair, rows_by_row])
@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_rows_are_laid_out_and_added_up_with_their_gradients(chosen: int, lay_out: Callable[..., Rows]) -> None:
    generator = torch.Generator().manual_seed(1)
    # Experts 1 and 4, the last, get no token, and expert 2 more than one block of rows.
    some = torch.tensor([2, 0, 3])[torch.stack([torch.randperm(3, generator=generator)[:chosen] for _ in range(9)])]
    many = torch.full((ROWS, chosen), 2)
    rows = lay_out(torch.cat([some, many]), 5)
    experts = torch.cat([some, many]).flatten().tolist()
    starts = [0, *rows.ends.tolist()]
    assert starts[1] == starts[2] != starts[3]
    assert starts[4] == starts[5] <= rows.count
    assert all(start % ROWS == 0 for start in starts)
    lies = rows.of_pair.flatten().tolist()
    assert len(set(lies)) == len(lies)
    assert all(starts[expert] <= row < starts[expert + 1] for row, expert in zip(lies, experts, strict=True))

    x, y, weights = (
        torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((len(some) + ROWS, 2), (rows.count, 2), (len(some) + ROWS, chosen))
    )
    assert torch.equal(dealt(x, rows)[rows.of_pair], x.unsqueeze(1).expand(-1, chosen, -1))
    expected = (y[rows.of_pair] * weights.unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(combined(y, weights, rows), expected)
    # What the other rows hold comes to nothing.
    upstream = torch.randn(rows.count, 2, generator=generator, dtype=torch.float64)
    taken = torch.zeros(rows.count, 1, dtype=torch.float64).index_fill(0, rows.of_pair.flatten(), 1)
    (found,) = torch.autograd.grad(dealt(x, rows), x, upstream)
    (alone,) = torch.autograd.grad(x.repeat_interleave(chosen, 0), x, upstream[rows.of_pair.flatten()])
    torch.testing.assert_close(found, alone)
    mine = torch.autograd.grad(combined(y, weights, rows), [y, weights], x.detach())
    torch.testing.assert_close(mine, torch.autograd.grad(expected, [y, weights], x.detach()))
    assert torch.equal(mine[0] * taken, mine[0])


def test_gradients_of_several_rows_are_rounded_once() -> None:
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = rows_by_pair(torch.tensor([[0, 1, 2]]), 3)
    # In bf16 256 + 1 is 256, twice; in fp32 it is 258.
    upstream = torch.zeros(rows.count, 1, dtype=torch.bfloat16)
    upstream[rows.of_pair[0], 0] = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)
    dealt(x, rows).backward(upstream)
    assert x.grad is not None
    assert x.grad.item() == 258


def test_tokens_of_each_expert_are_counted() -> None:
    experts = torch.tensor([[0, 3], [3, 1]])
    assert counted(experts, 5).tolist() == [1, 1, 0, 2, 0]
    # What a GPU does: there is none here.
    away = counted(experts.to("meta"), 5)
    assert (away.shape, away.dtype) == ((5,), torch.int64)


def test_grouped_products_equal_one_expert_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = _experts()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(100, 16, generator=generator, requires_grad=True)
    # The second of the experts gets no token.
    chosen = torch.tensor([0, 2, 3])[torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(100)])]
    weights = torch.rand(100, 2, generator=generator, requires_grad=True)
    upstream = torch.randn(100, 16, generator=generator)
    found = []
    for kinds in ({"cuda"}, {"cuda", "cpu"}):
        monkeypatch.setattr(feed_forward, "GROUPED_ON", kinds)
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(x, chosen, weights)
        found.append((y, *torch.autograd.grad(y, [x, weights, *experts.parameters()], upstream)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=0.02 * float(one.detach().abs().max()), rtol=0)
    assert not found[1][-1][1].any()


def test_experts_to_which_no_token_comes_make_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "GROUPED_ON", {"cpu"})
    experts, x = _experts(), torch.ones(0, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, torch.ones(0, 1, dtype=torch.long), torch.ones(0, 1))
    assert y.shape == (0, 16)
    assert all(not grad.any() for grad in torch.autograd.grad(y.sum(), [x, *experts.parameters()]))


def test_products_that_are_quantized_are_not_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "GROUPED_ON", {"cpu"})
    experts, seen = _experts(), []

    def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight)
        return F.linear(x, weight)

    experts.project_in = project
    with torch.autocast("cpu", torch.bfloat16):
        experts(torch.ones(3, 16), torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    assert len(seen) == 4


def _experts() -> Experts:
    config = _router(n_routed_experts=4, hidden_size=16, moe_intermediate_size=8).config
    experts = Experts(config)
    generator = torch.Generator().manual_seed(2)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return experts


def _one(experts: Experts, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    for expert, weight in zip(chosen.tolist(), weights, strict=True):
        gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
        y = y + weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
    return y


def _router(**changes: object) -> Router:
    sizes = {
        "model_type": "deepseek_v3", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "q_lora_rank": None, "kv_lora_rank": 4,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "rope_theta": 1e4, "intermediate_size": 8,
        "first_k_dense_replace": 0, "moe_intermediate_size": 4, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "initializer_range": 0.1, "rms_norm_eps": 1e-6, "vocab_size": 9, "max_position_embeddings": 8,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return Router(LatentConfig.model_validate({**sizes, **changes}))


@pytest.mark.parametrize(
    ("biased", "expected"),
    [
        ([0.9, 0.0, 0.5, 0.5], 2),  # the group whose best two sum highest wins, not the one with the single best
        ([-0.1, -0.2, -0.5, -0.6], 0),  # negative scores must still beat masked groups
        ([-0.5, -0.6, -0.1, -0.2], 2),
    ],
)
def test_a_token_chooses_within_its_best_group(biased: list[float], expected: int) -> None:
    assert _router().choose(torch.tensor([biased])).item() == expected


def test_the_bias_decides_who_is_chosen_and_not_how_much_it_counts() -> None:
    router = _router(n_group=1)
    torch.nn.init.zeros_(router.weight)
    router.e_score_correction_bias[:] = torch.tensor([-0.3, 0.2, 0.1, 0.0])
    chosen, weights = router(torch.randn(3, 8))
    assert chosen.flatten().tolist() == [1, 1, 1]
    assert weights.flatten().tolist() == [0.5, 0.5, 0.5]


def test_balancing_favours_the_idle_and_keeps_the_mean_bias() -> None:
    router = _router()
    router.tokens_per_expert[:] = torch.tensor([9.0, 1.0, 1.0, 1.0])
    router.rebalance(0.1)
    bias = router.e_score_correction_bias
    assert bias[0] < 0 < bias[1]
    assert abs(bias.mean().item()) < 1e-7
    assert router.tokens_per_expert.tolist() == [0, 0, 0, 0]


def test_tokens_are_counted_in_training_only(model: LanguageModel, ids: torch.Tensor) -> None:
    model.eval()(ids)
    assert all(router.tokens_per_expert.sum() == 0 for router in model.routers())
    model.train()(ids)
    assert all(router.tokens_per_expert.sum() == ids.numel() * 3 for router in model.routers())


def test_the_gate_and_its_gradient_are_autograd_s() -> None:
    gate_up = torch.randn(5, 14, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    theirs = F.silu(gate) * up
    torch.testing.assert_close(gated(gate_up), theirs)
    towards = torch.randn(5, 7)
    (found,) = torch.autograd.grad(gated(gate_up), gate_up, towards)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, gate_up, towards)[0])
