"""What would stop a late stage is told before the first one begins."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from odd import make_model, write_checkpoint
from tokenizers import Tokenizer, models

from lm.hugging_face_config import architecture_of
from lm.hugging_face_files import read_config
from tasks import params, paths
from tasks.collect.init import collect_init
from tasks.errors import BadInput, BadParameter
from tasks.init import Init, write_record


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"quantize__in_float": ["lm_head", "*.down_prj"]},
            "params.yaml: quantize.in_float: no layer's name matches '*.down_prj'. Names are model.layers.0.self_attn",
        ),
        (
            {"quantize__mesh": {"expert": 3}, "quantize__world_size": 3, "quantize__global_batch": 6},
            "params.yaml: quantize: n_routed_experts 4 does not divide over",
        ),
        ({"shard__vocab_size": None}, "params.yaml: shard.vocab_size is null, and train.init: scratch brings no token"),
    ],
)
def test_sections_that_do_not_fit_each_other(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    tiny.write_params(tmp_path, **changes)
    with pytest.raises(BadParameter, match=re.escape(told)) as caught:
        params.read(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


FROM = {"train__init": "given", "train__model": None, "shard__vocab_size": None}
LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "keep_adapter": False}


def start(project: Path, changes: dict[str, Any]) -> params.Params:
    """Puts what training starts from into ``project``, and returns the parameters with ``changes``."""
    write_checkpoint(project / "given", make_model)
    tiny.write_params(project, **{**FROM, **changes})
    collect_init("given")
    return params.read()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantize__in_float": ["*.q_a_prj"]}, "quantize.in_float: no layer's name matches '*.q_a_prj'"),
        ({"train__lora": LORA}, "train.bias_update_rate is 0.01, and train.lora leaves all but its factors as they"),
        (
            {"train__model": tiny.LLAMA},
            "train.model is not the model that train.init names: model_type q",
        ),
        (
            {"train__lora": {**LORA, "targets": ["*_prj"]}, "train__bias_update_rate": 0.0},
            "train.lora.targets: no layer is named *_prj; those that can be adapted are down_proj, ga",
        ),
        ({"shard__vocab_size": 300}, "shard.vocab_size is 300, and the tokenizer that comes with train.init has 257"),
        ({"train__seq_len": 65}, "train.seq_len 65 is more than the 64 positions of the model that train.init names"),
        (
            {"quantize__mesh": {"expert": 3}, "quantize__world_size": 3, "quantize__global_batch": 6},
            "quantize: n_routed_experts 8 does not divide over",
        ),
    ],
)
def test_a_checkpoint_that_later_stages_could_not_take(changes: dict[str, Any], told: str, project: Path) -> None:
    with pytest.raises(BadParameter, match=re.escape(f"params.yaml: {told}")) as caught:
        start(project, changes).check_start(paths.INIT)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_the_model_s_is_told_before_its_texts_are_read(project: Path) -> None:
    found = start(project, {})
    file = paths.INIT / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([f"<x{number}>" for number in range(6)] + ["<y>", "<pad>"])
    tokenizer.save(str(file))
    # As a Llama 2 that was published with a token for filling up batches.
    with pytest.raises(
        BadInput, match=r"tokenizer\.json: it has 265 tokens, .* 264: the model knows no '<pad>' \(264\)"
    ):
        found.check_start(paths.INIT)


def test_a_tokenizer_without_tokens_is_told_in_one_line(project: Path) -> None:
    found = start(project, {})
    Tokenizer(models.BPE()).save(str(paths.INIT / "tokenizer.json"))
    told = r"^models/init/tokenizer\.json: it has no token 256, which is config\.json's bos_token_id\. Mend "
    with pytest.raises(BadInput, match=told):
        found.check_start(paths.INIT)


def test_a_checkpoint_that_fits_and_one_of_another_run(project: Path) -> None:
    start(project, {"quantize__in_float": ["*.kv_a_proj_with_mqa"]}).check_start(paths.INIT)
    tiny.write_params(project, **{**FROM, "train__init": "other", "quantize__in_float": ["*.q_a_prj"]})
    params.read().check_start(paths.INIT)


def test_layers_that_a_checkpoint_only_says_it_has_are_no_difference(project: Path) -> None:
    start(project, {})
    model = architecture_of(read_config(paths.INIT)).model_dump()
    # As transformers writes a DeepSeek-V3.
    file = paths.INIT / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_nextn_predict_layers": 1}))
    tiny.write_params(project, **{**FROM, "train__model": model})
    params.read().check_start(paths.INIT)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train__model": None}, "train.model is null, and no version is promoted yet"),
        ({"shard__vocab_size": None}, "shard.vocab_size is null, and train.init brings no tokenizer"),
    ],
)
def test_before_the_first_version_all_has_to_be_described(changes: dict[str, Any], told: str, project: Path) -> None:
    write_record(paths.INIT, Init(init="previous"))
    tiny.write_params(project, train__init="previous")
    params.read().check_start(paths.INIT)
    tiny.write_params(project, train__init="previous", **changes)
    with pytest.raises(BadParameter, match=re.escape(f"params.yaml: {told}")):
        params.read().check_start(paths.INIT)


@pytest.mark.parametrize("section", ["train", "quantize"])
def test_a_torch_for_cpus_has_no_gpu(section: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = start(project, {f"{section}__device": "cuda"})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0")
    found.check_start(paths.INIT)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    with pytest.raises(BadParameter, match=rf"{section}\.device is cuda, and torch 2\.13\.0\+cpu, which is inst"):
        found.check_start(paths.INIT)


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
