"""What the routers chose, read from the graph that ships and from the float model."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from odd import export_over_bytes, make_grouped, make_grouped_mixture, make_model

from lm import hugging_face, onnx_model
from lm.model import LanguageModel
from lm.quantization import Plan
from lm.runtime import Generator
from lm.scheme import Float
from tasks.errors import BadInput
from tasks.evaluate.routing import Chosen, FloatRouting, Int8Routing

IDS = np.random.default_rng(0).integers(0, 256, (3, 40))
OVER_BYTES = {"vocab_size": tiny.VOCAB, "bos_token_id": tiny.VOCAB - 1, "eos_token_id": tiny.VOCAB - 1}


@pytest.fixture(params=[True, False], ids=["latent", "grouped"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make_model(**OVER_BYTES, n_group=4, topk_group=2) if request.param else make_grouped_mixture(**OVER_BYTES)


@pytest.fixture
def folder(model: LanguageModel, tmp_path: Path) -> Path:
    return export_over_bytes(tmp_path / "int8", lambda **_: model)


def read(side: Int8Routing) -> tuple[torch.Tensor, Chosen]:
    return side.run(IDS, side.new_cache(len(IDS)))


@torch.no_grad()
def test_a_graph_in_float_chooses_what_the_float_model_chooses(model: LanguageModel, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "tokenizer.json")
    onnx_model.export(model, Plan(Float(), Float()), tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps(hugging_face.config_to_json(model.config)))
    _, expected = FloatRouting(model).run(IDS)
    _, chosen = read(Int8Routing(tmp_path, model))
    # Layers with experts, batch, length, experts a token; sorted, because their order says nothing.
    assert chosen.shape == (len(model.routers()), 3, 40, 3)
    # The embedding is INT8 even here, which moves few tokens from one expert to another.
    assert (chosen == expected).all(axis=-1).mean() > 0.97
    assert (np.diff(chosen, axis=-1) > 0).all()


@torch.no_grad()
def test_rounding_moves_some_tokens_to_other_experts(model: LanguageModel, folder: Path) -> None:
    _, expected = FloatRouting(model).run(IDS)
    _, chosen = read(Int8Routing(folder, model))
    assert 0.5 < (chosen == expected).all(axis=-1).mean() < 1


def test_asking_what_was_chosen_does_not_change_what_is_computed(model: LanguageModel, folder: Path) -> None:
    plain = Generator(folder, threads=1)
    logits, _ = read(Int8Routing(folder, model))
    np.testing.assert_array_equal(logits.numpy(), plain.run(IDS, plain.new_cache(len(IDS))))


@torch.no_grad()
def test_each_thread_is_told_its_own_tokens_experts(model: LanguageModel) -> None:
    routing = FloatRouting(model)
    texts = [IDS[:, start : start + 20] for start in range(0, 20, 2)]
    alone = [routing.run(ids)[1] for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        for expected, (_, chosen) in zip(alone, pool.map(torch.no_grad()(routing.run), texts), strict=True):
            np.testing.assert_array_equal(chosen, expected)


def test_a_model_without_experts_has_no_choices(tmp_path: Path) -> None:
    folder = export_over_bytes(tmp_path / "int8", make_grouped)
    _, chosen = read(Int8Routing(folder, make_grouped(**OVER_BYTES)))
    assert chosen.shape == (0, 3, 40, 0)


def test_a_graph_that_does_not_tell_is_refused(model: LanguageModel, folder: Path) -> None:
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.name.startswith("mark/"):
            node.output[0] = f"{node.output[0]}_of_old"
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(BadInput, match=r"does not tell what its routers choose .* Rerun the stage 'quantize'"):
        Int8Routing(folder, model)
