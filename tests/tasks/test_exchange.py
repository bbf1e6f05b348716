"""Replicas that exchange fewer bytes: how many, at what loss, and that a run is the same when it is done again."""

import functools
import json
from pathlib import Path
from typing import Any, Literal

import exchanges
import forked
import pytest
import tiny
import torch
import torch.distributed as dist

from tasks.errors import BadParameter
from tasks.parallel.compressed import compressed, packed_int8, pays, unpacked_int8
from tasks.parallel.traffic import Traffic, sent_by
from tasks.section import read_section
from tasks.train.params import TrainParams
from tasks.world import World

ROOT = Path(__file__).parents[2]
SAVING = ["powersgd", "int8", "diloco", "diloco in bytes"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each kind of exchange gave on two processes."""
    folder = tmp_path_factory.mktemp("exchanges")
    forked.together(functools.partial(exchanges.work, folder), 2, folder)
    results: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return results


def loss(result: dict[str, Any]) -> float:
    return float(result["rows"][-1][3])


def test_whole_gradients_are_what_they_weigh(trained: dict[str, dict[str, Any]]) -> None:
    weights = 4 * sum(value.numel() for value in exchanges.model_of().parameters())
    # Once to begin with, then a gradient a step between two; the rest are counts, sums of losses and agreements.
    assert trained["none"]["sent"] == pytest.approx((exchanges.STEPS + 1) * weights, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "share"), [("powersgd", 0.1), ("diloco", 0.1), ("int8", 0.26), ("diloco in bytes", 0.08)]
)
def test_the_whole_run_sends_a_fraction(kind: str, share: float, trained: dict[str, dict[str, Any]]) -> None:
    assert 0 < trained[kind]["sent"] < share * trained["none"]["sent"]
    assert 0 < trained[kind]["share"] < share
    assert 1 < trained["none"]["share"] < 1.05


@pytest.mark.parametrize(
    ("kind", "more"), [("powersgd", 0.1), ("diloco", 0.02), ("int8", 0.02), ("diloco in bytes", 0.01)]
)
def test_the_loss_comes_close(kind: str, more: float, trained: dict[str, dict[str, Any]]) -> None:
    assert loss(trained[kind]) < (1 + more) * loss(trained["none"])
    # Far below ln 64, where no model had learned anything.
    assert loss(trained["none"]) < 1


@pytest.mark.parametrize("kind", SAVING)
def test_replicas_end_with_equal_bytes_again_and_after_a_resume(kind: str, trained: dict[str, dict[str, Any]]) -> None:
    first = trained[kind]
    assert first["weights"][0] == first["weights"][1] != trained["none"]["weights"][0]
    others = [f"{kind} resumed", *([f"{kind} again"] if kind in exchanges.AGAIN else [])]
    for other in others:
        assert trained[other]["weights"] == first["weights"]
        assert trained[other]["rows"] == first["rows"]
    resumed = trained[f"{kind} resumed"]
    assert any("goes on after step 24 of 48" in line for line in resumed["said"])
    # The whole run's bytes, whatever it was interrupted by: a meeting of the processes more, and an agreement.
    assert resumed["sent"] == pytest.approx(first["sent"], rel=0.05)


@pytest.mark.parametrize("kind", ["powersgd", "int8"])
def test_a_gradient_that_is_not_finite_leaves_no_trace_in_the_error(
    kind: str, trained: dict[str, dict[str, Any]]
) -> None:
    spoilt = trained[f"{kind} spoilt"]
    assert spoilt["skipped"] == [3]
    assert spoilt["weights"][0] == spoilt["weights"][1]
    assert loss(spoilt) < 1.2 * loss(trained[kind])


@pytest.mark.parametrize("compression", ["powersgd", "int8"])
def test_what_a_step_could_not_say_is_said_later(compression: Literal["powersgd", "int8"]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = exchanges.model_of()
        exchange = compressed(model, World(0, 1, torch.device("cpu"), "fp32"), compression, rank=2, seed=1)
        generator = torch.Generator().manual_seed(1)
        meant, said, first = 0.0, 0.0, 0.0
        # The same gradient again and again: what is left out of a step would be missing in their sum.
        constant = [torch.randn(value.shape, generator=generator) for value in model.parameters()]
        for step in range(40):
            for parameter, gradient in zip(model.parameters(), constant, strict=True):
                parameter.grad = gradient.clone()
            meant += torch.cat([value.grad.flatten() for value in model.parameters()])
            exchange.reduce(torch.tensor(1.0))
            said += torch.cat([value.grad.flatten() for value in model.parameters()])
            if not step:
                first = (said - meant).norm() / meant.norm()
        assert first > 1e-3
        assert (said - meant).norm() / meant.norm() < first / 2
    finally:
        dist.destroy_process_group()


def test_each_expert_of_a_stack_has_directions_of_its_own() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = exchanges.model_of()
        exchange = compressed(model, World(0, 1, torch.device("cpu"), "fp32"), "powersgd", rank=1, seed=1)
        generator = torch.Generator().manual_seed(1)
        stacks_EAB = [value for value in model.parameters() if value.dim() == 3]
        meant = []
        for stack_EAB in stacks_EAB:
            experts, rows, columns = stack_EAB.shape
            column_EA1 = torch.randn(experts, rows, 1, generator=generator)
            meant.append(column_EA1 @ torch.randn(experts, 1, columns, generator=generator))
            stack_EAB.grad = meant[-1].clone()
        assert meant
        exchange.reduce(torch.tensor(1.0))
        # One direction says all of an expert's gradient, and of all the experts' as one matrix it does not.
        for stack_EAB, meant_EAB in zip(stacks_EAB, meant, strict=True):
            torch.testing.assert_close(stack_EAB.grad, meant_EAB, atol=1e-4, rtol=1e-4)
    finally:
        dist.destroy_process_group()


def test_bytes_are_rounded_to_half_a_step_of_their_block() -> None:
    values = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 512)
    values[1, :256] = 0
    packed = packed_int8(values)
    assert packed.shape == (3, 512 + 8)
    largest = values.unflatten(1, (2, 256)).abs().amax(dim=2, keepdim=True).expand(3, 2, 256).flatten(1)
    assert ((unpacked_int8(packed) - values).abs() <= largest / 127 * 0.501).all()
    values[2, 300] = torch.inf
    assert not unpacked_int8(packed_int8(values)).isfinite().all()


def test_what_is_smaller_than_its_factors_is_sent_whole() -> None:
    assert pays(torch.Size([64, 64]), 4)
    assert pays(torch.Size([8, 64, 64]), 4)
    assert not pays(torch.Size([8, 64]), 8)
    assert not pays(torch.Size([64]), 1)


@pytest.mark.parametrize(
    ("operation", "processes", "sent"),
    [
        ("gloo:all_reduce", 2, 4000), ("nccl:all_reduce", 4, 6000), ("gloo:all_to_all", 4, 3000),
        ("nccl:_all_gather_base", 4, 12000), ("nccl:_reduce_scatter_base", 4, 3000), ("gloo:broadcast", 2, 2000),
        ("gloo:all_reduce", 1, 0), ("gloo:send", 2, 4000),
    ],
)  # fmt: skip
def test_bytes_of_a_collective(operation: str, processes: int, sent: int) -> None:
    entry = {"profiling_name": operation, "input_sizes": [[10, 90], [100]], "input_dtypes": ["Float", "Float"]}
    assert sent_by(entry, processes) == sent


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compression": "topk"}, "train.compression: input should be 'none', 'powersgd' or 'int8', found 'topk'"),
        ({"compression": "int8", "mesh__shard": 2}, "compression int8 takes whole gradients, and the mesh cuts them"),
        ({"compression": "powersgd", "elastic": True}, "set elastic to false or compression to none"),
        ({"compression": "powersgd", "compression_rank": 0}, "train.compression_rank: input should be greater than"),
        ({"compression": "powersgd", "diloco__inner_steps": 4}, "set compression to int8 or none, or diloco"),
        ({"diloco__inner_steps": 3}, "validate_every 4 is not a multiple of diloco.inner_steps 3"),
        ({"diloco__inner_steps": 4}, "checkpoint_every 2 is not a multiple of diloco.inner_steps 4"),
        ({"diloco__inner_steps": 2, "elastic": True}, "set elastic to false or diloco.inner_steps to 0"),
        ({"diloco__inner_steps": 2, "mesh__shard": 2}, "diloco exchanges between replicas, and mesh makes one"),
        ({"diloco__inner_steps": 2, "mesh__expert": 2}, "diloco takes replicas that are whole or cut by shard"),
    ],
)
def test_what_does_not_go_together_is_one_line(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    # `python -m tasks.train` reads its section before it starts a process: see test_train.
    tiny.write_params(tmp_path, **{f"train__{name}": value for name, value in changes.items()})
    with pytest.raises(BadParameter) as refused:
        read_section("train", TrainParams, tmp_path / "params.yaml")
    assert reason in str(refused.value)


def test_where_messages_are_sent_that_gloo_does_not_record_no_bytes_are_told() -> None:
    counted = Traffic(torch.device("cpu"), messages=True)
    counted.go_on(100)
    assert counted.after_step(last=True) is None
