"""What is compiled gives the same, and is refused where it cannot be. How it trains on meshes: test_parallel."""

from pathlib import Path

import meshes
import needed
import pytest
import tiny
import torch
from meshes import Case

from flows import environment
from lm import feed_forward
from lm.model import LanguageModel
from tasks import compiled
from tasks.errors import BadParameter
from tasks.section import read_section
from tasks.train.params import TrainParams


def test_generated_code_gives_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        compiled.check()
    except BadParameter as error:
        needed.missing(str(error))
    # torch would compile a program for each of the processor's vector units, to see whether the compiler knows it.
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", True)
    case = Case({}, "qwen3")
    windows = torch.from_numpy(meshes.Reader(1, 4).batch(torch.arange(4)))
    found = []
    for compiles in (False, True):
        model = meshes.model_of(case)
        if compiles:
            torch._dynamo.utils.counters.clear()
            compiled.compile_layers(model, torch.device("cpu"))
        loss = model.loss(windows)
        loss.backward()
        found.append((loss.item(), {name: value.grad for name, value in model.named_parameters()}))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-6)
    for name, expected in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["qwen3", "llama-biases"])
def test_a_dense_layer_is_one_graph_there_and_back(family: str) -> None:
    torch._dynamo.utils.counters.clear()
    model = meshes.model_of(Case({}, family))
    compiled.compile_layers(model, torch.device("cpu"), backend="eager")
    model.loss(torch.from_numpy(meshes.Reader(1, 4).batch(torch.arange(4)))).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_on_a_gpu_experts_and_cross_entropy_are_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is traced for a GPU, run by torch's own kernels on this CPU.
    monkeypatch.setattr(feed_forward, "GROUPED_ON", {"cpu"})
    config = meshes.MODELS["latent"].model_copy(update={"hidden_size": 16, "moe_intermediate_size": 8})
    windows = torch.from_numpy(meshes.Reader(1, 4).batch(torch.arange(4)))
    found = []
    for compiles in (False, True):
        model = LanguageModel(config)
        model.initialize(1)
        if compiles:
            torch._dynamo.utils.counters.clear()
            compiled.compile_layers(model, torch.device("cuda"), backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(windows)
        loss.backward()
        found.append((loss.item(), {name: value.grad for name, value in model.named_parameters()}))
    # What CPUs alone compute in a way of their own breaks graphs, but nothing waits for a number.
    assert not [why for why in torch._dynamo.utils.counters["graph_break"] if "item()" in why or "disable" in why]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    for name, expected in found[0][1].items():
        assert expected is not None
        other = found[1][1][name]
        torch.testing.assert_close(other, expected, atol=0.02 * float(expected.abs().max()), rtol=0, msg=name)


def test_without_a_compiler_it_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(BadParameter, match=r"train\.compile needs a C\+\+ compiler \(g\+\+.*\) and Python's headers"):
        compiled.check()
    tiny.write_params(tmp_path, train__compile=True)
    tiny.write_shards(tmp_path)
    code, output = tiny.run("train", tmp_path)
    assert code == 2
    assert output.count("\n") == 1, output
    assert "train.compile needs a C++ compiler" in output


def test_what_compiling_hides_is_not_asked_for(tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__compile=True, train__activation_checkpointing="selective")
    with pytest.raises(BadParameter, match="selective keeps products that compile hides"):
        read_section("train", TrainParams, tmp_path / "params.yaml")


def test_a_version_records_what_compiled_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.lock").write_text("")
    tiny.write_params(tmp_path)
    assert environment.record(tmp_path).compiler is None
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'a compiler 1.2'; echo more\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    tiny.write_params(tmp_path, train__compile=True)
    here = environment.record(tmp_path)
    assert here.compiler == "a compiler 1.2"
    other = here.model_copy(update={"compiler": "a compiler 1.1"})
    assert [str(one) for one in environment.compare(other, here)] == [
        "compiler: a compiler 1.1 recorded, a compiler 1.2 here"
    ]
