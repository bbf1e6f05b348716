"""Running out of GPU memory ends in one line with numbers, and the numbers are near what is really kept."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import disturb
import odd
import pytest
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lm import compensation, low_rank
from lm.distillation import teach
from lm.model import LanguageModel
from lm.quantization import PLANS
from lm.weights import on_meta
from tasks.errors import BadParameter
from tasks.optimizers import make_optimizer
from tasks.out_of_memory import activation_bytes, largest, remember_allocations, told
from tasks.quantize import memory
from tasks.recomputation import Recomputation, recompute
from tasks.train.params import TrainParams

ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 is free."


def message(params: TrainParams, model: LanguageModel, length: int = 16) -> str:
    with pytest.raises(BadParameter) as caught, told("train", model, params, length, "bf16"):
        raise torch.OutOfMemoryError(ERROR)
    return str(caught.value)


def test_the_three_largest_are_named_with_numbers_and_cures(project: Path) -> None:
    told_line = message(tiny.train_params(project, train__micro_batch=4), odd.make_model(), length=4096)
    assert told_line.startswith("params.yaml: train: out of GPU memory (CUDA out of memory). The largest")
    assert "\n" not in told_line
    sizes = re.findall(
        r"(activations|logits|weights and their gradients|state of the optimizer) ([\d.]+) [MG]iB", told_line
    )
    assert [name for name, _ in sizes] == ["activations", "logits", "weights and their gradients"]
    assert re.search(
        r"activation_checkpointing: full makes it [\d.]+ MiB, micro_batch: 2 makes it [\d.]+ MiB", told_line
    )


def test_fewer_windows_are_not_advised_where_logits_come_in_pieces(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, model = tiny.train_params(project, train__micro_batch=4), odd.make_model()
    monkeypatch.setattr("lm.loss.LOGITS_HELD", 4096 * 101)
    told_line = message(params, model, length=4096)
    assert re.search(r"logits 6\.\d+ MiB \(whatever micro_batch is\)", told_line), told_line
    monkeypatch.setattr("lm.loss.LOGITS_HELD", 3 * 4096 * 101)
    told_line = message(params, model, length=4096)
    assert re.search(r"logits 18\.\d+ MiB \(micro_batch: 2 makes it 12\.\d+ MiB\)", told_line), told_line
    monkeypatch.setattr("lm.loss.LOGITS_HELD", 2 * 4096 * 101)
    assert "micro_batch: 1 makes it 6." in message(params, model, length=4096)


def test_what_lora_leaves_as_it_is_has_neither_gradients_nor_moments(project: Path) -> None:
    params, model = tiny.train_params(project), odd.make_model()
    whole = sum(parameter.numel() for parameter in model.parameters())
    low_rank.adapt(model, ["q_proj"], rank=2, alpha=4, seed=1)
    factors = sum(parameter.numel() for parameter in model.parameters()) - whole
    sizes = {use.what: use.size for use in largest(model, params, 16, "fp32")}
    assert sizes["weights and their gradients"] == 4 * (whole + factors) + 4 * factors
    assert sizes["state of the optimizer"] == 8 * factors
    assert "muon" not in " ".join(use.cure for use in largest(model, params, 16, "fp32"))


def test_a_float_model_that_teaches_is_counted(project: Path) -> None:
    model, teacher = odd.make_model(), odd.make_model()
    assert "teaches" not in message(tiny.train_params(project), model, length=1)
    teach(model, teacher)
    (found,) = (use for use in largest(model, tiny.train_params(project), 1, "fp32") if "teaches" in use.what)
    assert found.size == 4 * sum(value.numel() for value in teacher.parameters())
    assert "objective: text" in found.cure


def test_what_is_turned_down_already_is_not_advised_again(project: Path) -> None:
    params = tiny.train_params(
        project, train__micro_batch=1, train__activation_checkpointing="full", train__optimizer="muon"
    )
    told_line = message(params, odd.make_model(), length=4096)
    assert "activation_checkpointing: full makes" not in told_line
    assert "micro_batch: " not in told_line
    assert "lower train.seq_len" in told_line


@pytest.mark.parametrize(
    ("make", "experts"), [(odd.make_model, "n_routed_experts"), (odd.make_grouped_mixture, "num_experts")]
)
def test_a_large_model_for_few_tokens_is_told_to_shrink_itself(make: Any, experts: str, project: Path) -> None:
    told_line = message(tiny.train_params(project, train__micro_batch=1), make(), length=2)
    assert re.search(
        rf"weights and their gradients .* of it routed experts; lower train.model's .* or {experts}\b", told_line
    )
    assert re.search(r"optimizer: muon makes it [\d.]+ MiB", told_line)


@pytest.mark.parametrize("make", [odd.make_model, odd.make_grouped, odd.make_grouped_mixture])
@pytest.mark.parametrize("which", ["none", "full"])
def test_the_estimate_of_activations_is_near_what_is_kept(which: Recomputation, make: Any) -> None:
    model = make().train()
    recompute(model, which)
    ids = torch.randint(0, 100, (2, 64), generator=torch.Generator().manual_seed(0))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(ids)
    found = sum(size for place, size in kept.items() if place not in weights)
    # Of `full` the hooks see what stays, and not the one layer that is there while it is computed again.
    again = activation_bytes(model, 128, "none", "fp32") / len(model.model.layers) if which == "full" else 0
    assert 0.5 < activation_bytes(model, 128, which, "fp32") / (found + again) < 2


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_size_of_the_optimizer_s_state_is_its_own(kind: str, project: Path) -> None:
    params = tiny.train_params(project, train__optimizer=kind)
    model = odd.make_model().train()
    optimizer = make_optimizer(model, params)
    model.loss(torch.zeros(1, 9, dtype=torch.long)).backward()
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    estimates = {use.what: use.size for use in largest(model, params, 9, "fp32")}
    assert estimates["state of the optimizer"] == pytest.approx(held, rel=0.02)


@pytest.fixture
def eight() -> Iterator[DeviceMesh]:
    """A mesh of eight processes, of which this one is the first and the others do not exist."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


def test_what_a_process_has_of_a_model_that_is_cut_is_told(eight: DeviceMesh, project: Path) -> None:
    params = tiny.train_params(project, train__mesh__shard=8, train__world_size=16, train__global_batch=32)
    model = odd.make_grouped(hidden_size=48)
    count = sum(parameter.numel() for parameter in model.parameters())
    for layer in model.model.layers:
        fully_shard(layer, mesh=eight)
    fully_shard(model, mesh=eight)
    # What is being laid out lies nowhere yet.
    for found in (model, on_meta(model.config)):
        sizes = {use.what: use.size for use in largest(found, params, 16, "fp32")}
        for what in ("weights and their gradients", "state of the optimizer"):
            # Of 101 words, an eighth is 13.
            assert sizes[what] == pytest.approx(count, rel=0.02)
        told_line = message(params, found, length=1)
        assert re.search(r"gradients [\d.]+ MiB \(lower .* or num_hidden_layers; mesh.shard: 16 makes it ", told_line)
        assert re.search(r"optimizer [\d.]+ MiB \(optimizer: muon makes .*, mesh.shard: 16 makes it ", told_line)
        # With eight processes there are no replicas to take them from.
        alone = tiny.train_params(project, train__mesh__shard=8, train__world_size=8, train__global_batch=16)
        assert "mesh.shard" not in message(alone, found, length=1)


def test_torch_s_summary_and_snapshot_are_written_on_a_gpu(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "the summary")
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: recorded.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"the snapshot"))
    remember_allocations(torch.device("cpu"))
    assert not recorded
    remember_allocations(torch.device("cuda"))
    assert recorded
    told_line = message(tiny.train_params(project), odd.make_model())
    for name, content in {"train-memory-0.txt": b"the summary", "train-memory-0.pickle": b"the snapshot"}.items():
        assert f".overnight/measurements/{name}" in told_line
        assert (project / ".overnight/measurements" / name).read_bytes() == content


def test_other_errors_pass(project: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="another"),
        told("train", odd.make_model(), tiny.train_params(project), 16, "bf16"),
    ):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("trainer.Trainer.step", {}),
        ("trainer.Trainer.validate", {}),
        ("trainer.lay_out", {}),
        ("parallel.sharded.fill", {"train__mesh__shard": 2}),
        ("parallel.pipeline.fill", {"train__mesh__pipeline": 2}),
    ],
)
def test_a_training_ends_in_that_line(where: str, changes: dict[str, Any], project: Path) -> None:
    tiny.write_params(project, **changes)
    tiny.write_shards(project)
    code, output = tiny.run("train", project, disturb.run_out_of_memory, ERROR=ERROR, WHERE=f"tasks.{where}")
    assert code == 2, output
    assert "error: params.yaml: train: out of GPU memory (CUDA out of memory)" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "where", ["worker.calibration_windows", "worker.calibrate", "worker.compensate", "schemes.Measure._sums"]
)
def test_what_quantizing_does_without_training_ends_in_that_line(where: str, project: Path) -> None:
    tiny.write_params(project, **tiny.ALONE)
    tiny.write_shards(project)
    odd.write_checkpoint(project / "models/float", odd.make_model)
    code, output = tiny.run(
        "quantize", project, disturb.run_out_of_memory, ERROR=ERROR, WHERE=f"tasks.quantize.{where}"
    )
    assert code == 2, output
    line = tiny.error_line(output)
    assert line.startswith("params.yaml: quantize: out of GPU memory (CUDA out of memory). The largest, as estimated")
    # Nothing is trained yet, so there is neither a gradient nor an optimizer.
    assert "calibration_windows: 8 makes it" in line
    assert "optimizer" not in line


@pytest.mark.parametrize("make", [odd.make_model, odd.make_grouped, odd.make_grouped_mixture])
def test_what_compensation_holds_is_near_the_estimate(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = make(), dict.fromkeys(("moments", "states", "logits"), 0)
    expected = {use.what: use for use in memory.largest(model, 20, 3, compensated=True)}
    moments = compensation._Moments

    class Watched(moments):
        def record(self, *arguments: Any) -> torch.Tensor:
            found = super().record(*arguments)
            now = sum(moment.nbytes for _, _, moment in self.of_weight.values())
            held["moments"] = max(held["moments"], now)
            return found

    model.lm_head.register_forward_hook(lambda _, x, logits: held.update(states=x[0].nbytes, logits=logits.nbytes))
    monkeypatch.setattr(compensation, "_Moments", Watched)
    ids = torch.randint(0, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    compensation.compensate(model, PLANS["blockwise-8"], ids)
    # A router is not rounded, and no token may have chosen an expert.
    assert expected["what compensation knows of a block's inputs"].size == pytest.approx(held["moments"], rel=0.2)
    assert expected["calibration windows"].size == 3 * held["states"] + held["logits"]
    weights = sum(parameter.nbytes for parameter in make().parameters())
    assert expected["weights, in float and rounded"].size == 2 * weights
    # Without it, one window after the other is read.
    without = memory.largest(model, 20, 3, compensated=False)
    assert {use.what: use.size for use in without} == {
        "weights, in float and rounded": 2 * weights,
        "a calibration window": held["states"] + held["logits"],
    }
