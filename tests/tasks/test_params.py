"""What would stop a late stage is told before the first one begins."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from tasks import params
from tasks.errors import BadParameter


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"quantize__in_float": ["lm_head", "*.down_prj"]},
            "params.yaml: quantize.in_float: no layer's name matches '*.down_prj'. Names are model.layers.0.self_attn",
        ),
        ({"shard__vocab_size": None}, "params.yaml: shard.vocab_size is null, and train.init: scratch brings no token"),
    ],
)
def test_sections_that_do_not_fit_each_other(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    tiny.write_params(tmp_path, **changes)
    with pytest.raises(BadParameter, match=re.escape(told)) as caught:
        params.read(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantize__in_float": ["*.down_proj", "model.embed_tokens", "*.mlp.gate", "*.experts"]},
        # Only when it is there does one know what a checkpoint's layers are called, and which tokens it has.
        {"train__init": "given", "train__model": None, "shard__vocab_size": None, "quantize__in_float": ["*.q_a_proj"]},
    ],
)
def test_sections_that_may_fit_each_other(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny.write_params(tmp_path, **changes)
    assert params.read(tmp_path / "params.yaml").quantize.in_float
