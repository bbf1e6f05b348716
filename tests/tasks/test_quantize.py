"""Quantization: the audit finds what was planted, and the stage resumes like training does."""

import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from onnx import numpy_helper

from lm import hugging_face, onnx_int8
from lm.model import LanguageModel
from tasks.errors import Refused
from tasks.quantize.audit import audit, expected_products


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny.write_params(folder)
    tiny.write_shards(folder)
    code, output = tiny.run("train", folder)
    assert code == 0, output
    return folder


@pytest.fixture
def model(trained: Path) -> LanguageModel:
    return hugging_face.load(trained / "models/float")


@pytest.fixture
def graph(model: LanguageModel, tmp_path: Path) -> Path:
    onnx_int8.export(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_audit_counts_what_the_graph_holds(graph: Path, model: LanguageModel) -> None:
    found = audit(graph, model)
    assert found.int8_products == len(expected_products(model)) == found.operators["MatMulInteger"]
    assert found.float_products == ["model.layers.1.mlp.gate.weight"]
    stored = {weight.name: weight for weight in found.weights}
    assert stored["model.embed_tokens.int8"].type == "int8"
    int8 = sum(weight.bytes for weight in found.weights if weight.type == "int8")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "gate.weight" not in name)
    assert found.bytes_by_type["int8"] == int8 == matrices


def _float_of(path: Path, name: str) -> onnx.ModelProto:
    """The graph with the INT8 product by ``name`` replaced by one in float, as a careless exporter would leave it."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight = numpy_helper.to_array(tensor).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, f"{name}.float"))
    node = next(node for node in model.graph.node if name in node.input)
    node.op_type = "MatMul" if node.op_type == "MatMulInteger" else node.op_type
    node.input[list(node.input).index(name)] = f"{name}.float"
    return model


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.int8",
        "model.layers.0.self_attn.kv_b_proj.int8",
        "model.layers.1.mlp.experts.2.down_proj.int8",
        "model.layers.1.mlp.shared_experts.up_proj.int8",
    ],
)
def test_a_layer_left_float_is_named(name: str, graph: Path, model: LanguageModel) -> None:
    onnx.save(_float_of(graph, name), graph)
    with pytest.raises(Refused, match=rf"{name}\.float is multiplied in float.*{name} is not multiplied in INT8"):
        audit(graph, model)


def test_a_float_embedding_is_named(graph: Path, model: LanguageModel) -> None:
    planted = onnx.load(graph)
    name = "model.embed_tokens.int8"
    tensor = next(tensor for tensor in planted.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))
    onnx.save(planted, graph)
    with pytest.raises(Refused, match=r"embed_tokens\.int8 is looked up in float"):
        audit(graph, model)


def test_a_killed_quantization_goes_on_to_the_same_bytes(trained: Path) -> None:
    code, output = tiny.run("quantize", trained)
    assert code == 0, output
    expected = tiny.files_of(trained / "models/int8")
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "config.json", "audit.json"} <= expected.keys()
    report = json.loads(expected["audit.json"])
    assert report["int8_share_of_bytes"] > 0.5

    for path in trained.glob(".overnight/checkpoints/quantize/*/*"):
        path.unlink()
    process = tiny.stage("quantize", trained)
    deadline = time.monotonic() + 120
    while not list(trained.glob(".overnight/checkpoints/quantize/*/*.pt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert tiny.run("quantize", trained)[0] == 0
    assert tiny.files_of(trained / "models/int8") == expected
