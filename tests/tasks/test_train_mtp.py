"""Multi-token prediction through the stages: trained, kept, gone on from, left out."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from odd import make_model, write_checkpoint
from safetensors.torch import load_file, save_file

from lm import gguf_write, hugging_face
from lm.weights import fill
from tasks import init, paths
from tasks.collect.init import collect_init
from tasks.errors import BadParameter
from tasks.train import start

FURTHER = {"train__model__num_nextn_predict_layers": 1}
GIVEN = {"train__init": "given", "train__model": None, "train__world_size": 1}


def test_what_is_trained_with_it_is_deployed_without(tmp_path: Path) -> None:
    reports = {}
    tiny.write_shards(tmp_path)
    for name, changes in {"without": {}, "with": FURTHER}.items():
        tiny.write_params(tmp_path, **tiny.ALONE, **changes)
        code, output = tiny.run("train", tmp_path)
        assert code == 0, output
        reports[name] = json.loads((tmp_path / paths.TRAIN_REPORT).read_text())
    assert reports["with"]["parameters"] == reports["without"]["parameters"]
    # Of the text alone, though what is trained on counts a second prediction.
    for split in ("train_loss", "valid_loss"):
        assert reports["with"][split] == pytest.approx(reports["without"][split], rel=0.05)
    assert reports["with"] != reports["without"]

    trained = hugging_face.load(tmp_path / paths.FLOAT, mtp=True)
    assert len(trained.mtp) == 1
    code, output = tiny.run("quantize", tmp_path)
    assert code == 0, output
    graph = (tmp_path / paths.INT8_GRAPH).read_bytes()
    assert b"model.layers.1." in graph
    assert b"model.layers.2." not in graph


@pytest.mark.parametrize(("weight", "layers"), [(0.3, 1), (0.0, 0)])
def test_a_training_goes_on_with_the_layers_of_its_checkpoint(weight: float, layers: int, project: Path) -> None:
    params = tiny.train_params(project, **GIVEN, train__mtp_loss_weight=weight)
    manifest = tiny.write_shards(project)
    write_checkpoint(project / "given", make_model, num_nextn_predict_layers=1)
    (project / "given/tokenizer.json").write_bytes((project / paths.TOKENIZER).read_bytes())
    collect_init("given")
    model, weights = start.begun(start.check(params, manifest), params, manifest)
    fill(model, weights)
    assert len(model.mtp) == layers
    assert model.mtp_loss_weight == weight
    there = load_file(init.checkpoint() / "model.safetensors")  # type: ignore[operator]
    for further in model.mtp:
        assert there["model.layers.3.eh_proj.weight"].equal(further.eh_proj.weight)


def test_a_window_has_a_token_that_far_ahead(tmp_path: Path) -> None:
    with pytest.raises(
        BadParameter, match="num_nextn_predict_layers 2 predicts further ahead than a window of seq_len 2"
    ):
        tiny.train_params(tmp_path, train__model__num_nextn_predict_layers=2, train__seq_len=2)


def test_of_lora_it_is_left_out(tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "keep_adapter": False}
    assert tiny.train_params(tmp_path, **GIVEN).trains_mtp
    assert not tiny.train_params(tmp_path, **GIVEN, train__lora=lora).trains_mtp


def test_what_is_exported_passes_its_layers_over(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, make_model, num_nextn_predict_layers=1)
    gguf_write.check(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    # Of a layer that the configuration does not tell of, nobody knows what it is.
    save_file({**tensors, "model.layers.4.mlp.up_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(gguf_write.Unfit, match=r"model\.layers\.4\.mlp\.up_proj\.weight"):
        gguf_write.check(tmp_path)
    assert len(model.mtp) == 1
