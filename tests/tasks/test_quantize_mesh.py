"""Fine-tuning with roundings where a mesh cuts the model: what replicas of the whole model come to."""

import csv
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import tiny
from meshes import MODELS
from onnx import numpy_helper

from lm import hugging_face
from tasks.quantize.__main__ import check_model
from tasks.quantize.params import QuantizeParams
from tasks.section import read_section


class Made(NamedTuple):
    """What the stage wrote: the rows of the curve, the last trial, and the graph's numbers by name."""

    curve: list[list[float]]
    trial: dict[str, float]
    stored: dict[str, Any]


def quantized(folder: Path, **changes: Any) -> Made:
    # Biases that move show whether buffers come back too.
    tiny.write_params(
        folder,
        quantize__learning_rate=1e-3,
        quantize__bias_update_rate=0.001,
        **{f"quantize__{name}": value for name, value in changes.items()},
    )
    code, output = tiny.run("quantize", folder)
    assert code == 0, output
    rows = list(csv.reader((folder / "models/int8/curve.csv").read_text().splitlines()))[1:]
    trial = json.loads((folder / "models/int8/quantization.json").read_text())["trials"][-1]
    graph = onnx.load(folder / "models/int8/model.onnx").graph
    return Made(
        [list(map(float, row)) for row in rows],
        {name: trial[name]["value"] for name in ("relative_loss", "kl_divergence")},
        {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer},
    )


@pytest.fixture(scope="module")
def replicas(trained: Path) -> Callable[..., Made]:
    """What two replicas come to with the changes that it is given; each is made once."""
    return functools.cache(functools.partial(quantized, trained))


TOWARDS_FLOAT = {"scheme": "weight-only-4", "objective": "float", "activation_checkpointing": "full"}


@pytest.mark.parametrize(
    ("mesh", "changes", "processes"),
    [
        ({"shard": 2}, {"scheme": "qat"}, {"world_size": 4, "micro_batch": 1}),
        ({"expert": 2}, {"scheme": "qat"}, {}),
        ({"pipeline": 2}, {"scheme": "qat"}, {}),
        ({"shard": 2}, TOWARDS_FLOAT, {}),
    ],
    ids=["replicate-and-shard", "expert", "pipeline", "towards-float"],
)
def test_fine_tuning_on_a_mesh_is_that_of_replicas(
    trained: Path,
    replicas: Callable[..., Made],
    mesh: dict[str, int],
    changes: dict[str, Any],
    processes: dict[str, int],
) -> None:
    expected = replicas(**changes)
    shutil.rmtree(trained / ".overnight/checkpoints/quantize")
    found = quantized(trained, **changes, **processes, mesh=mesh)
    # Each process has written its part of the model.
    parts = list(trained.glob(".overnight/checkpoints/quantize/*/parts-000000004/*.distcp"))
    assert len(parts) == processes.get("world_size", 2)
    np.testing.assert_allclose(found.curve, expected.curve, rtol=1e-4)
    assert found.trial == pytest.approx(expected.trial, rel=1e-3, abs=1e-5)
    assert found.trial["relative_loss"] != 0
    (router,) = hugging_face.load(trained / "models/float").routers()
    assert router.e_score_correction_bias is not None
    assert np.abs(expected.stored["model.layers.1.mlp.gate.bias"] - router.e_score_correction_bias.numpy()).max() > 1e-3
    assert found.stored.keys() == expected.stored.keys()
    for name, value in expected.stored.items():
        if value.dtype != np.float32:
            # Where a value lies on a boundary, another order of sums may take it to the next level.
            assert (found.stored[name] != value).mean() < 0.01, name
        elif not name.endswith(".sums"):
            np.testing.assert_allclose(found.stored[name], value, atol=1e-4, rtol=1e-3, err_msg=name)


def test_layers_that_only_training_has_do_not_stand_in_the_way(project: Path) -> None:
    tiny.write_params(project, quantize__mesh={"pipeline": 2, "pipeline_schedule": "zero-bubble"})
    (project / "models/float").mkdir(parents=True)
    config = hugging_face.config_to_json(MODELS["latent-deep"])
    (project / "models/float/config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    check_model(read_section("quantize", QuantizeParams))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mesh": {"tensor": 2}}, "mesh.tensor 2 would round parts of products, and the graph rounds whole "),
        (
            {"mesh": {"pipeline": 2}, "objective": "float"},
            "objective float compares whole models, and mesh.pipeline 2 cuts ",
        ),
        ({"mesh": {"expert": 3}, "world_size": 3, "global_batch": 6}, "n_routed_experts 4 does not divide over "),
    ],
)
def test_what_cannot_be_cut_is_one_line(trained: Path, changes: dict[str, Any], told: str) -> None:
    tiny.write_params(trained, **{f"quantize__{name}": value for name, value in changes.items()})
    code, output = tiny.run("quantize", trained)
    assert code == 2
    assert tiny.error_line(output).startswith(f"params.yaml: quantize: {told}"), output
