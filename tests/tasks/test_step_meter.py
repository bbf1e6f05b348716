"""A step's seconds are told apart, and utilization counts the products that the model really takes."""

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import odd
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from lm import low_rank
from lm.model import LanguageModel
from tasks import peak, step_meter
from tasks.mesh import MeshParams
from tasks.step_meter import StepMeter, active_in_products
from tasks.world import Meshes, World


class _Alone(World):
    def sum_all(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture
def alone() -> World:
    return _Alone(0, 1, torch.device("cpu"), "fp32")


@pytest.fixture
def meter(alone: World) -> StepMeter:
    return StepMeter(odd.make_grouped(), 1000, alone)


def test_the_seconds_of_a_step_are_told_apart(alone: World) -> None:
    model = odd.make_grouped()
    meter = StepMeter(model, 1000, alone)
    meter.begin()
    with meter.waiting_for_data():
        time.sleep(0.05)
    model.loss(torch.zeros(1, 9, dtype=torch.long)).backward()
    time.sleep(0.1)
    meter.reduced()
    with meter.communicating():
        time.sleep(0.02)
    time.sleep(0.03)
    report = meter.end(7, 3.0, 1.0, 0.1, [1.5])
    assert 0.05 <= report.seconds_for_data < 0.1
    assert 0.12 <= report.seconds_for_communication < 0.2
    assert report.seconds >= 0.2
    assert report.tokens_per_second == pytest.approx(1000 / report.seconds, rel=1e-2)
    assert meter.totals()["share_of_time_waiting_for_data"] == pytest.approx(0.05 / report.seconds, rel=0.3)


def test_waits_for_a_collective_count_once_and_in_one_thread_alone(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist.Work, "wait", time.sleep)
    cut = dataclasses.replace(alone, mesh=cast(Meshes, object()))
    meter = StepMeter(odd.make_grouped(), 1000, cut)
    short, long = cast(dist.Work, 0.4), cast(dist.Work, 1.0)
    with meter.seeing_waits():
        meter.begin()
        with meter.communicating():
            dist.Work.wait(short)
        dist.Work.wait(cast(dist.Work, 0.05))
        elsewhere = threading.Thread(target=lambda: dist.Work.wait(long))
        elsewhere.start()
        elsewhere.join()
        report = meter.end(1, 3.0, 1.0, 0.1, [])
    assert report.seconds_for_communication is not None
    assert 0.45 <= report.seconds_for_communication < 0.8
    assert meter.totals()["share_of_time_communicating"] == pytest.approx(
        report.seconds_for_communication / report.seconds, rel=1e-2
    )


@pytest.mark.parametrize(("device", "tensor", "compiled"), [("meta", 1, False), ("cpu", 2, True)])
def test_where_waits_cannot_be_seen_nobody_knows_how_long_they_are(
    device: str, tensor: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_meter, "peak", lambda world: (1e9, "a test"))
    meshes = cast(Meshes, SimpleNamespace(layout=MeshParams(tensor=tensor).over(2)))
    cut = _Alone(0, 2, torch.device(device), "fp32", meshes)
    meter = StepMeter(odd.make_grouped(), 1000, cut, compiled)
    meter.begin()
    wait = dist.Work.wait
    with meter.seeing_waits(), meter.communicating():
        assert dist.Work.wait is wait
    assert meter.end(1, 3.0, 1.0, 0.1, []).seconds_for_communication is None
    assert meter.totals()["share_of_time_communicating"] is None


def test_the_next_step_begins_at_zero(alone: World) -> None:
    model = odd.make_grouped()
    meter = StepMeter(model, 1000, alone)
    meter.begin()
    model.loss(torch.zeros(1, 9, dtype=torch.long)).backward()
    with meter.waiting_for_data(), meter.communicating():
        time.sleep(0.02)
    meter.end(1, 3.0, 1.0, 0.1, [])
    meter.begin()
    meter.reduced()
    report = meter.end(2, 3.0, 1.0, 0.1, [])
    assert report.seconds_for_data == 0
    assert report.seconds_for_communication == 0
    assert meter.seconds_for_data >= 0.02


def test_utilization_is_six_operations_a_parameter_and_token_over_the_peak(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_meter, "peak", lambda world: (1e9, "a test"))
    model = odd.make_model()
    meter = StepMeter(model, 1000, alone)
    meter.begin()
    time.sleep(0.01)
    report = meter.end(1, 3.0, 1.0, 0.1, [])
    assert report.mfu == pytest.approx(6 * active_in_products(model) * 1000 / report.seconds / 1e9, rel=1e-2)
    assert meter.totals()["peak_is"] == "a test"


@pytest.mark.parametrize(
    ("make", "targets", "share"),
    [
        (odd.make_grouped, "*_proj", 1),
        (odd.make_model, "*.mlp.experts.*", 3 / 8),
        (odd.make_grouped_mixture, "*.mlp.experts.*", 3 / 9),
    ],
)
def test_frozen_weights_count_for_two_thirds(
    make: Callable[[], LanguageModel], targets: str, share: float, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_meter, "peak", lambda world: (1e9, "a test"))
    model = make()
    low_rank.adapt(model, [targets], rank=2, alpha=4, seed=1)
    factors = share * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    report = StepMeter(model, 1000, alone)
    report.begin()
    time.sleep(0.01)
    found = report.end(1, 3.0, 1.0, 0.1, [])
    operations = 4 * active_in_products(model) + 2 * factors
    assert found.mfu == pytest.approx(operations * 1000 / found.seconds / 1e9, rel=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_what_counts_as_active_is_what_is_multiplied(tied: bool) -> None:
    model = odd.make_grouped(tie_word_embeddings=tied)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 16, dtype=torch.long))
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in counts.items() if str(operator) in ("aten.mm", "aten.addmm"))
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    assert products == 2 * 32 * (active_in_products(model) - vectors)


@pytest.mark.parametrize(
    ("seconds", "fastest", "size"),
    [
        # A product that takes long is followed by no larger one.
        ([0.5, 0.2, 0.1, 0.4], 0.1, 128),
        ([*[0.001] * 4, 0.005, 0.004, 0.02, 0.04], 0.004, 256),
        # The larger one may be the slower.
        ([*[0.001] * 4, 0.5, 0.2, 0.1, 0.4], 0.001, 128),
        ([*[0.001] * 12, 0.005, 0.002, 0.003, 0.004], 0.002, 1024),
    ],
)
def test_the_peak_is_the_fastest_of_some_products(
    seconds: list[float], fastest: float, size: int, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = iter(seconds)
    now = itertools.accumulate(itertools.chain.from_iterable((0.0, seconds) for seconds in took))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    found, source = step_meter.peak(alone)
    assert found == pytest.approx(2 * size**3 / fastest)
    assert next(took, None) is None
    assert source == "fp32 product measured here"


@pytest.mark.parametrize(("gpu", "own"), [("A100", 312e12), (None, 40e12)])
def test_the_peak_is_that_of_all_gpus_though_they_differ(
    gpu: str | None, own: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithAnL4(World):
        def sum_all(self, values: torch.Tensor) -> torch.Tensor:
            return values + 121e12

    monkeypatch.setattr(peak, "_model_of", lambda device: gpu)
    monkeypatch.setattr(peak, "_measured", lambda world: 40e12)
    found, source = peak.peak(WithAnL4(0, 2, torch.device("cpu"), "bf16"))
    assert found == own + 121e12
    assert source == ("data sheet of A100" if gpu else "bf16 product measured here")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_null_in_json(value: float, meter: StepMeter) -> None:
    meter.begin()
    written = json.dumps(meter.end(1, value, value, 0.1, []).to_json(), allow_nan=False)
    assert json.loads(written)["loss"] is None


@pytest.mark.parametrize(
    ("waited", "seconds", "told"), [(5.0, 100.0, "5.0% of the steps' time"), (0.5, 100.0, None), (0.5, 1.0, None)]
)
def test_waiting_for_data_is_told_where_it_costs_something(
    waited: float, seconds: float, told: str | None, meter: StepMeter
) -> None:
    meter.seconds, meter.seconds_for_data = seconds, waited
    found = meter.waited_too_long()
    assert found is None if told is None else found is not None and told in found
