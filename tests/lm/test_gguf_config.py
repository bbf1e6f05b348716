"""The shape that is read from metadata of GGUF: with Overnight's own keys, without them, and from older files."""

from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import odd
import pytest
import torch
from gguf_files import DEEPSEEK_YARN, LLAMA_3, NEW, PROMPTS, V2, YARN, edited, greedy, make_checkpoint, written

from lm import gguf_file
from lm.config import Llama3Scaling
from lm.gguf_config import config_from
from lm.gguf_metadata import metadata
from lm.gguf_tensors import Unfit, rope_factors
from lm.model import LanguageModel


def test_rope_factors_of_llama_3_are_read_without_our_keys(tmp_path: Path) -> None:
    scaling = {**LLAMA_3, "factor": 32.0, "original_max_position_embeddings": 8192}
    model, folder = make_checkpoint(tmp_path, rope_theta=500000.0, head_dim=64, rope_scaling=scaling)
    path = written(folder)
    reader = gguf.GGUFReader(path)
    assert all(f"overnight.{name}" in reader.fields for name in Llama3Scaling.model_fields)
    foreign = edited_without_own(path, tmp_path / "foreign.gguf")
    assert gguf_file.load(foreign).config == model.config.model_copy(update={"initializer_range": 0.02})


def edited_without_own(source: Path, path: Path) -> Path:
    path.write_bytes(source.read_bytes().replace(b"overnight.", b"elsewhere."))
    return path


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (odd.make_grouped, {"model_type": "qwen2", "hidden_size": 96, "rope_scaling": YARN}),
        (odd.make_grouped, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        (odd.make_model, {"rope_scaling": DEEPSEEK_YARN}),
        (odd.make_model, {**V2, "rope_scaling": DEEPSEEK_YARN}),
        (odd.make_model, V2),
    ],
    ids=["qwen2", "llama", "v3", "v2", "v2, not stretched"],
)
def test_what_is_stretched_and_v2_are_read_without_our_keys(
    make: Callable[..., LanguageModel], changes: dict[str, object], tmp_path: Path
) -> None:
    # One of the depths at which llama.cpp takes queries as they are.
    model, folder = make_checkpoint(tmp_path, make, **{"num_hidden_layers": 26, "initializer_range": 0.02, **changes})
    foreign = edited_without_own(written(folder), tmp_path / "foreign.gguf")
    assert gguf_file.load(foreign).config == model.config


def test_an_older_file_of_v2_says_nothing_of_scores(tmp_path: Path) -> None:
    model, folder = make_checkpoint(tmp_path, odd.make_model, **V2)
    older = edited(written(folder), tmp_path / "older.gguf", {}, ("deepseek2.expert_gating_func",))
    assert gguf_file.load(older).config == model.config
    # Groups that V2 itself has can be read, though llama.cpp chooses others.
    groups: dict[str, object] = {"deepseek2.expert_group_count": 4, "deepseek2.expert_group_used_count": 2}
    limited = gguf_file.load(edited(written(folder), tmp_path / "groups.gguf", groups)).config
    assert limited == model.config.model_copy(update={"n_group": 4, "topk_group": 2})
    for changes, said in (
        ({"deepseek2.expert_gating_func": 3}, "its expert_gating_func is 3; a model with 1 or 2 alone can be read"),
        ({"deepseek2.rope.scaling.type": "yarn", "deepseek2.rope.scaling.factor": 4}, "lack deepseek2.*yarn_log_mult"),
    ):
        with pytest.raises(Unfit, match=said):
            gguf_file.load(edited(written(folder), tmp_path / "other.gguf", dict(changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": 24, "n_group": 4, "topk_group": 2},
        {**V2, "num_hidden_layers": 27, "rope_scaling": DEEPSEEK_YARN},
    ],
    ids=["v3", "v2"],
)
def test_files_older_than_latent_attention_in_llama_cpp_are_read(changes: dict[str, object], tmp_path: Path) -> None:
    model, folder = make_checkpoint(tmp_path, odd.make_model, **changes)
    older = with_expanded_keys(model, written(folder), tmp_path / "older.gguf")
    # llama.cpp still reads such files, and so tells whether this is one.
    answers = llama_cpp.continued(older, PROMPTS, NEW)
    assert answers == greedy(model, PROMPTS, answers)
    loaded = gguf_file.load(older)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state[name], tensor), name


def with_expanded_keys(model: LanguageModel, source: Path, path: Path) -> Path:
    """Writes the latent ``model`` in ``source`` as llama.cpp's converter did until April 2025."""
    config, state, layers = model.config, model.state_dict(), range(model.config.num_hidden_layers)
    lengths = {"key_length": config.qk_nope_head_dim + config.qk_rope_head_dim, "value_length": config.v_head_dim}
    values = {**lengths, "head_count_kv": config.num_attention_heads}
    return edited(
        source,
        path,
        {f"deepseek2.attention.{key}": value for key, value in values.items()},
        without=[f"deepseek2.attention.{key}_mla" for key in lengths],
        drop=[f"blk.{layer}.attn_{name}_b.weight" for layer in layers for name in "kv"],
        add={
            f"blk.{layer}.attn_kv_b.weight": state[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].numpy()
            for layer in layers
        },
    )


def test_keys_of_yarn_that_do_not_agree_are_named(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path, odd.make_model, rope_scaling=DEEPSEEK_YARN)
    for changes, said in (
        (
            {"deepseek2.rope.scaling.factor": 2.0},
            "its rope.scaling.factor is 2.0, and .* own keys .* make it 4.0",
        ),
        ({"deepseek2.rope.scaling.yarn_log_multiplier": 0.0}, "say 0.0 for deepseek2.rope.scaling.yarn_log_multiplier"),
    ):
        with pytest.raises(Unfit, match=said):
            gguf_file.load(edited(written(folder), tmp_path / "other.gguf", dict(changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"overnight.factor": "four"}, "its metadata make no model: overnight.factor: Input should be a valid number"),
        ({"overnight.factor": [4.0, 4.0]}, "its metadata make no model: overnight.factor: Input should be a valid n"),
        ({"overnight.factor": None}, "its metadata make no model: overnight.factor: Field required"),
        ({"overnight.factor": 1e300}, r"its rope.scaling.factor would have to be 1e\+300, which fp32 cannot hold"),
        (
            {"overnight.factor": 1e300, "llama.rope.scaling.factor": float("inf")},
            r"its rope.scaling.factor would have to be 1e\+300, which fp32 cannot hold",
        ),
        ({"overnight.rope_type": None}, "its metadata make no model: overnight.rope_type: Field required"),
        ({"overnight.rope_type": "llama3"}, "its metadata make no model: overnight.rope_type: Input should be 'yarn'"),
        ({"overnight.original_max_position_embeddings": 16.5}, "no model: overnight.original_max_position_embeddings:"),
        ({"overnight.beta_slow": 40.0}, "its metadata make no model: beta_fast 32.0 is less than beta_slow 40.0"),
        (
            {"llama.rope.scaling.original_context_length": [1, 2]},
            r"its rope.scaling.original_context_length is \[1, 2\]",
        ),
        ({"llama.rope.scaling.original_context_length": []}, r"its rope.scaling.original_context_length is \[\], and"),
        ({"llama.rope.scaling.original_context_length": None}, "its rope.scaling.original_context_length is None, and"),
        ({"llama.rope.scaling.factor": "4"}, "its metadata say '4' for llama.rope.scaling.factor; with YaRN a number"),
        ({"llama.rope.scaling.factor": 1e300}, r"its rope.scaling.factor is 1e\+300, and .* own keys .* make it 4.0"),
    ],
)
def test_keys_of_yarn_that_are_spoilt_are_named(changes: dict[str, object], said: str) -> None:
    config = odd.make_grouped(rope_scaling=YARN).config
    found = {"general.architecture": "llama", **metadata(config), "tokenizer.ggml.eos_token_id": 100}
    assert config_from(found, (101, 42), tied=False, factors=None) == config
    spoilt = {key: value for key, value in {**found, **changes}.items() if value is not None}
    with pytest.raises(Unfit, match=said) as caught:
        config_from(spoilt, (101, 42), tied=False, factors=None)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"overnight.factor": 2.0}, "its rope.scaling.factor is 4.0, and Overnight's own key beside it says 2.0"),
        ({"overnight.factor": "4"}, "its rope.scaling.factor is 4.0, and Overnight's own key beside it says '4'"),
        ({"overnight.factor": 1e300}, "its rope.scaling.factor would have to be 1e[+]300, which fp32 cannot hold"),
        ({"llama.rope.scaling.factor": [4.0]}, r"its metadata say \[4\.0\] for llama\.rope\.scaling\.factor"),
        (
            {"llama.rope.scaling.factor": 0.5, "overnight.factor": 0.5},
            "make no model: rope_scaling.linear.factor: I",
        ),
    ],
)
def test_keys_of_linear_scaling_that_are_spoilt_are_named(changes: dict[str, object], said: str) -> None:
    config = odd.make_grouped(rope_scaling={"rope_type": "linear", "factor": 4.0}).config
    found = {"general.architecture": "llama", **metadata(config), "tokenizer.ggml.eos_token_id": 100}
    assert config_from(found, (101, 42), tied=False, factors=None) == config
    with pytest.raises(Unfit, match=said):
        config_from({**found, **changes}, (101, 42), tied=False, factors=None)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(key: str) -> None:
    config = odd.make_grouped(rope_scaling={"rope_type": "linear", "factor": 4.0}).config
    known = {"general.architecture": "llama", **metadata(config), "tokenizer.ggml.eos_token_id": 100}
    foreign = {name: value for name, value in known.items() if "scaling" not in name and "overnight" not in name}
    found = {**foreign, f"llama.{key}": 4.0}
    assert config_from(found, (101, 42), tied=False, factors=None).rope_scaling == config.rope_scaling
    with pytest.raises(Unfit, match=r"rope_freqs\.weight and a rope\.scaling\.factor"):
        config_from(found, (101, 42), tied=False, factors=np.ones(8, np.float32))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("factor", "said"),
    [
        ("four", "its metadata make no model: overnight.factor: Input should be a valid number"),
        (1e300, "its rope_freqs.weight are not those of Llama 3.1"),
    ],
)
def test_keys_of_llama_3_that_are_spoilt_are_named(factor: object, said: str) -> None:
    config = odd.make_grouped(model_type="llama", rope_scaling=LLAMA_3).config
    found = {"general.architecture": "llama", **metadata(config), "tokenizer.ggml.eos_token_id": 100}
    factors = rope_factors(config.head_dim, config.rope_theta, config.rope_scaling)
    assert config_from(found, (101, 42), tied=False, factors=factors) == config
    with pytest.raises(Unfit, match=said):
        config_from({**found, "overnight.factor": factor}, (101, 42), tied=False, factors=factors)


def test_a_file_whose_own_keys_of_yarn_are_spoilt_is_named(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path, rope_scaling=YARN)
    other = edited(written(folder), tmp_path / "other.gguf", {}, ("overnight.rope_type",))
    with pytest.raises(Unfit, match=rf"^{other}: its metadata make no model: overnight.rope_type: Field required"):
        gguf_file.load(other)
