"""Training low-rank factors: what is refused, what a stage leaves, and that a killed run ends in the same bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny
import torch
from checkpoint_files import tensors_of
from odd import make_grouped, make_model, write_checkpoint
from safetensors.torch import load_file

from lm import hugging_face, low_rank
from tasks import init, paths
from tasks.collect.init import collect_init
from tasks.errors import BadParameter, UserMistake
from tasks.section import read_section
from tasks.shards import read_manifest
from tasks.train import start
from tasks.train.params import TrainParams

LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "*.1.mlp.*_proj"], "keep_adapter": True}


def write_params(project: Path, lora: dict[str, Any] | None = None, **changes: Any) -> None:
    given = {"train__init": "given", "train__model": None, "shard__vocab_size": None, "train__learning_rate": 0.01}
    few = {"train__steps": 6, "train__validate_every": 2}
    tiny.write_params(project, **{**given, **few, "train__lora": {**LORA, **(lora or {})}, **changes})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with shards in which training adapts the checkpoint in `given`."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    tiny.write_shards(tmp_path)
    write_checkpoint(tmp_path / "given", make_grouped)
    (tmp_path / "given/tokenizer.json").write_bytes(paths.TOKENIZER.read_bytes())
    collect_init("given")
    return tmp_path


def train(project: Path) -> dict[str, bytes]:
    codes = forked.end(forked.start([project, project], project / "log"))
    assert codes == [0, 0], (project / "log").read_text()
    return tiny.files_of(project / "models")


@pytest.mark.parametrize(
    "how",
    # int8 alone sends what powersgd does, and Muon alone moves what it moves on a mesh.
    [
        {},
        {"compression": "powersgd", "compression_rank": 1},
        {"diloco": {"inner_steps": 2}, "compression": "int8"},
        {"optimizer": "muon", "mesh": {"shard": 2}},
    ],
    ids=str,
)
def test_a_checkpoint_is_adapted_and_a_killed_run_ends_in_the_same_bytes(how: dict[str, Any], project: Path) -> None:
    write_params(project, **{f"train__{name}": value for name, value in how.items()})
    expected = train(project)
    report = json.loads(paths.TRAIN_REPORT.read_text())
    # Rank 2: of three q_proj [96, 42]; of one layer's gate_proj and up_proj [70, 42] and down_proj [42, 70].
    assert report["trained_parameters"] == 2 * (3 * (96 + 42) + 3 * (70 + 42))
    base, trained = hugging_face.load(paths.INIT).state_dict(), hugging_face.load(paths.FLOAT).state_dict()
    assert report["parameters"] == sum(tensor.numel() for tensor in base.values())
    factors = load_file(paths.ADAPTER / low_rank.WEIGHTS)
    # Where peft's AutoPeftModel finds what it belongs to.
    assert json.loads((paths.ADAPTER / "adapter_config.json").read_text())["base_model_name_or_path"] == "given"
    for name, tensor in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        added = torch.zeros_like(tensor)
        if f"{stem}.lora_A.weight" in factors:
            added = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"] * 2
            assert added.abs().max() > 1e-3
        assert torch.equal(trained[name], tensor + added), name

    saved = sorted(project.glob(".overnight/checkpoints/train/*/step-*.pt"))
    # Of replicas that train apart, those of the first.
    prefix = "replica-0." if "diloco" in how else ""
    kept, ends = list(tensors_of(saved[-1], f"{prefix}model.")), (".exp_avg", ".momentum_buffer")
    moments = len([name for name in tensors_of(saved[-1], f"{prefix}optimizer.") if name.endswith(ends)])
    assert {name.rpartition(".")[2] for name in kept} == {"lora_A", "lora_B"}
    assert moments == len(kept) == 12
    saved[-1].unlink()
    (project / "log").unlink()
    assert train(project) == expected
    assert "goes on after step" in (project / "log").read_text()


def test_a_stage_in_which_all_is_frozen_has_its_place_in_checkpoints(project: Path) -> None:
    # The first of two stages has the first layer.
    write_params(project, {"targets": ["*.2.mlp.*_proj"]}, train__mesh={"pipeline": 2})
    expected = train(project)
    assert json.loads(paths.TRAIN_REPORT.read_text())["trained_parameters"] == 2 * 3 * (70 + 42)
    max(project.glob(".overnight/checkpoints/train/*/step-*.pt")).unlink()
    shutil.rmtree(project / "models/float")
    assert train(project) == expected


@pytest.mark.parametrize(
    ("lora", "changes", "said"),
    [
        ({}, {"train__init": "scratch"}, "lora adapts a model that is there, and init: scratch has none"),
        ({"rank": 0}, {}, r"train\.lora\.rank: input should be greater than or equal to 1, found 0"),
        ({"targets": []}, {}, r"train\.lora\.targets: .* at least 1 item"),
        ({"dropout": 0.1}, {}, r"train\.lora\.dropout: unknown key"),
        (
            {"targets": ["q_proj", "c_attn"]},
            {},
            r"train\.lora\.targets: no layer is named c_attn; .* are down_proj, ga",
        ),
    ],
)
def test_what_cannot_be_is_one_line(lora: dict[str, Any], changes: dict[str, Any], said: str, project: Path) -> None:
    changes = {"train__model": tiny.LLAMA, **changes} if "train__init" in changes else changes
    write_params(project, lora, **changes)
    with pytest.raises(BadParameter, match=said):
        start.check(read_section("train", TrainParams), read_manifest())


def test_routers_stay_as_they_are_too(project: Path) -> None:
    write_checkpoint(project / "given", make_model)
    (project / "given/tokenizer.json").write_bytes(paths.TOKENIZER.read_bytes())
    collect_init("given")
    write_params(project)
    with pytest.raises(BadParameter, match=r"the routers' biases too\. Set bias_update_rate: 0\.0"):
        start.check(read_section("train", TrainParams), read_manifest())
    write_params(project, train__bias_update_rate=0.0)
    assert start.check(read_section("train", TrainParams), read_manifest()) == paths.INIT


def test_experts_factors_are_cut_along_their_rank(project: Path) -> None:
    write_checkpoint(project / "given", make_model)
    (project / "given/tokenizer.json").write_bytes(paths.TOKENIZER.read_bytes())
    collect_init("given")
    mesh = {"train__mesh": {"shard": 2, "expert": 2}, "train__world_size": 4, "train__bias_update_rate": 0.0}
    write_params(project, {"rank": 3, "targets": ["o_proj", "*.experts.down_proj"]}, **mesh)
    with pytest.raises(BadParameter, match=r"rank 3 does not divide over mesh\.shard 2, .*layers\.1\.mlp\.experts\."):
        start.check(read_section("train", TrainParams), read_manifest())
    write_params(project, {"rank": 3, "targets": ["o_proj", "*.shared_experts.*"]}, **mesh)
    assert start.check(read_section("train", TrainParams), read_manifest()) == paths.INIT


def test_layers_that_predict_further_tokens_are_left_out_and_that_is_told(project: Path) -> None:
    write_checkpoint(project / "given", make_model, num_nextn_predict_layers=1)
    (project / "given/tokenizer.json").write_bytes(paths.TOKENIZER.read_bytes())
    collect_init("given")
    write_params(project, {"keep_adapter": False, "targets": ["o_proj"]}, train__bias_update_rate=0.0, train__steps=2)
    train(project)
    further = hugging_face.left_out(paths.INIT)
    assert further > 10
    assert hugging_face.left_out(paths.FLOAT) == 0
    told = (
        f"{further} tensors of multi-token prediction are left out: lora does not train them, and models/float has none"
    )
    assert told in (project / "log").read_text()


def test_there_is_nothing_to_adapt_before_the_first_version(project: Path) -> None:
    write_params(project, train__init="previous", train__model=tiny.LLAMA)
    for file in paths.INIT.iterdir():
        file.unlink()
    init.write_record(paths.INIT, init.Init(init="previous"))
    with pytest.raises(UserMistake, match=r"train\.lora adapts a model that is there, and no version is promoted yet"):
        start.check(read_section("train", TrainParams), read_manifest())
