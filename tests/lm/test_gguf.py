"""GGUF: llama.cpp writes and reads the same tokens as the model that went in, and the same model comes out again."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import odd
import pytest
import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf_files import (
    DEEPSEEK_YARN,
    LLAMA_3,
    NEW,
    PROMPTS,
    SIZE,
    V2,
    YARN,
    edited,
    greedy,
    make_checkpoint,
    split,
    written,
)

from lm import gguf_file, gguf_write
from lm.gguf_config import config_from
from lm.gguf_tensors import Unfit
from lm.model import LanguageModel

MODELS = {
    "llama": (odd.make_grouped, {}),
    "llama, stretched and tied": (odd.make_grouped, {"rope_scaling": LLAMA_3, "tie_word_embeddings": True}),
    "llama, with biases": (odd.make_grouped, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (odd.make_grouped, {"model_type": "qwen2", "hidden_size": 96}),
    "qwen3, one head of keys": (odd.make_grouped, {"model_type": "qwen3", "num_key_value_heads": 1}),
    "qwen2moe": (odd.make_gated_mixture, {"hidden_size": 96}),
    "qwen3moe": (odd.make_grouped_mixture, {}),
    "latent": (odd.make_model, {}),
    "latent, query latent and groups": (odd.make_model, {"q_lora_rank": 24, "n_group": 4, "topk_group": 2}),
    "latent, tied": (odd.make_model, {"tie_word_embeddings": True}),
    "latent, dense only": (odd.make_model, {"first_k_dense_replace": 3}),
    "latent, not normalized": (odd.make_model, {"first_k_dense_replace": 0, "norm_topk_prob": False}),
    "llama, stretched evenly": (odd.make_grouped, {"rope_scaling": {"rope_type": "linear", "factor": 2.1}}),
    "llama, stretched for longer texts alone": (
        odd.make_grouped,
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "qwen2, stretched by YaRN": (odd.make_grouped, {"model_type": "qwen2", "hidden_size": 96, "rope_scaling": YARN}),
    "llama, stretched by YaRN": (odd.make_grouped, {"rope_scaling": YARN}),
    "qwen2moe, stretched by YaRN": (odd.make_gated_mixture, {"hidden_size": 96, "rope_scaling": YARN}),
    "qwen3moe, stretched by YaRN": (odd.make_grouped_mixture, {"rope_scaling": YARN}),
    "latent, stretched by YaRN": (odd.make_model, {"rope_scaling": DEEPSEEK_YARN}),
    "v2": (odd.make_model, V2),
    "v2, query latent, stretched by YaRN": (odd.make_model, {**V2, "q_lora_rank": 24, "rope_scaling": DEEPSEEK_YARN}),
    "v2, 27 layers, stretched by YaRN": (
        odd.make_model,
        {**V2, "num_hidden_layers": 27, "rope_scaling": DEEPSEEK_YARN},
    ),
    "latent, 26 layers": (odd.make_model, {"num_hidden_layers": 26, "n_shared_experts": 1}),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Path]:
    make, changes = request.param
    return make_checkpoint(tmp_path_factory.mktemp("model"), make, **changes)


def test_llama_cpp_writes_the_same_tokens(checkpoint: tuple[LanguageModel, Path]) -> None:
    model, folder = checkpoint
    answers = llama_cpp.continued(written(folder), PROMPTS, NEW)
    assert [len(answer) for answer in answers] == [NEW, NEW]
    assert answers == greedy(model, PROMPTS, answers)


def test_llama_cpp_ends_a_text_at_whatever_ends_it(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path)
    (answer,) = llama_cpp.continued(written(folder), PROMPTS[:1], NEW)
    # Tokens of text, whose names say nothing to llama.cpp.
    first, second, *_ = (token for token in dict.fromkeys(answer) if token not in answer[:2])
    asked = "/completion", {"prompt": PROMPTS[0], "n_predict": NEW, "temperature": 0, "top_k": 1, "return_tokens": True}
    for ends in ([SIZE - 1, first, second], [SIZE - 1, second], [first]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        (found,) = llama_cpp.ask(written(folder), asked)
        place = min(answer.index(end) for end in ends if end in answer)
        assert (found["stop_type"], found["tokens"][:place]) == ("eos", answer[:place])


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (odd.make_grouped_mixture, {"norm_topk_prob": False}, "normalizes the weights of a qwen3moe's experts"),
        (
            odd.make_gated_mixture,
            {"hidden_size": 96, "norm_topk_prob": True},
            "normalizes no weights of a qwen2moe's experts",
        ),
        (
            odd.make_gated_mixture,
            {"hidden_size": 96, "tie_word_embeddings": True},
            "reads no qwen2moe whose head",
        ),
        (odd.make_gated_mixture, {}, "reads a qwen2_moe alone whose hidden_size is num_attention_heads x head_dim"),
        (odd.make_grouped_mixture, {"attention_bias": True}, "reads an attention_bias on outputs of no qwen3_moe"),
        (odd.make_grouped_mixture, {"rope_scaling": LLAMA_3}, "reads Llama 3's rope_scaling of no qwen3_moe"),
        (odd.make_grouped, {"model_type": "qwen3", "rope_scaling": LLAMA_3}, "reads Llama 3's .* of no qwen3"),
        (
            odd.make_grouped,
            {"rope_scaling": {**YARN, "beta_slow": 0.5}},
            "takes YaRN's beta_fast as 32 and beta_slow as 1",
        ),
        (
            odd.make_grouped,
            {"rope_scaling": {**YARN, "attention_factor": 1.0}},
            "scales YaRN's .* says something else",
        ),
        (odd.make_model, {"rope_scaling": YARN}, "reads YaRN of .* mscale and mscale_all_dim are one number"),
        (odd.make_model, {"rope_scaling": {**DEEPSEEK_YARN, "mscale": 1.0}}, "reads YaRN of .* are one number above 0"),
        (odd.make_model, {**V2, "n_group": 4, "topk_group": 2}, "chooses a DeepSeek-V2's groups of experts otherwise"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_stays_here(make, changes, said: str, tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path, make, **changes)
    with pytest.raises(Unfit, match=rf"llama\.cpp {said}"):
        written(folder)


def test_experts_are_read_as_llama_cpp_s_converter_writes_them(tmp_path: Path) -> None:
    model, folder = make_checkpoint(tmp_path, odd.make_grouped_mixture, initializer_range=0.02)
    own = ("overnight.initializer_range", "qwen3moe.vocab_size", "qwen3moe.rope.dimension_count")
    # Of no use here.
    more: dict[str, object] = {"feed_forward_length": 6144, "expert_shared_feed_forward_length": 0}
    values = {f"qwen3moe.{key}": value for key, value in more.items()}
    assert gguf_file.load(edited(written(folder), tmp_path / "foreign.gguf", values, own)).config == model.config


def test_layers_of_multi_token_prediction_stay_behind(tmp_path: Path) -> None:
    model, folder = make_checkpoint(tmp_path, odd.make_model, num_nextn_predict_layers=1)
    answers = llama_cpp.continued(written(folder), PROMPTS, NEW)
    assert answers == greedy(model, PROMPTS, answers)


def test_a_model_that_comes_back_is_the_one_that_went(checkpoint: tuple[LanguageModel, Path]) -> None:
    model, folder = checkpoint
    loaded = gguf_file.load(written(folder))
    assert loaded.config == model.config
    state = model.state_dict()
    assert loaded.state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded.state[name], tensor), name
    LanguageModel(loaded.config).load_state_dict(loaded.state)


@pytest.mark.parametrize(("make", "sizes"), [(odd.make_model, {"q_lora_rank": 32}), (odd.make_grouped_mixture, {})])
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_types_are_near_and_llama_cpp_runs_them(
    kind: gguf_write.Kind, make: Callable[..., LanguageModel], sizes: dict[str, int], tmp_path: Path
) -> None:
    # Widths of 64 fill Q8_0's blocks of 32; those of 48 and 22 do not.
    model, folder = make_checkpoint(tmp_path, make, hidden_size=64, **sizes)
    path = written(folder, kind)
    types = {tensor.name: GGMLQuantizationType(tensor.tensor_type).name for tensor in gguf.GGUFReader(path).tensors}
    assert types["token_embd.weight"] == kind.upper()
    assert types["blk.1.ffn_down_exps.weight"] == ("F16" if kind == "q8_0" else kind.upper())
    assert {types[name] for name in types if name.endswith(("ffn_gate_inp.weight", ".bias", "norm.weight"))} == {"F32"}
    state = gguf_file.load(path).state
    for name, tensor in model.state_dict().items():
        step = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254}[kind] * tensor.abs().max()
        assert (state[name] - tensor).abs().max() <= step * 1.15, name
    assert [len(tokens) for tokens in llama_cpp.continued(path, PROMPTS, 4)] == [4, 4]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path)
    first = written(folder, "q8_0").read_bytes()
    assert written(folder, "q8_0").read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "falcon"},
            "its architecture is 'falcon'; known are deepseek2, llama, qwen2, qwen3, qwen2moe, qwen3moe",
        ),
        ({"drop": "blk.1.ffn_up.weight"}, "it lacks blk.1.ffn_up.weight"),
        ({"add": "blk.9.what"}, "it has, beyond what its configuration says, blk.9.what"),
        ({"llama.block_count": 2}, "it has, beyond what its configuration says, blk.2.attn_k.weight, "),
        ({"llama.block_count": 2**18}, "its metadata say that it has 262,144 layers and experts, more than its 30 ten"),
        ({"llama.feed_forward_length": 71}, r"model.layers.0.mlp.gate_proj.weight would have the shape \(70, 42\)"),
        ({"llama.rope.scaling.type": "longrope"}, "its rope.scaling.type is longrope; a model with none alone can be"),
        ({"llama.rope.scaling.type": "linear"}, "its metadata lack llama.rope.scaling.factor; with linear scaling a"),
        ({"llama.rope.scaling.type": "yarn"}, "its metadata lack llama.rope.scaling.factor; with YaRN"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4,
                "llama.rope.scaling.yarn_attn_factor": 2,
            },
            "its rope.scaling.yarn_attn_factor is 2; a model with 1.0 alone can be read",
        ),
        ({"llama.attention.head_count": 5}, "its metadata make no model: num_attention_heads 5 does not divide"),
        ({"llama.attention.head_count": 0}, "its metadata say 0 for llama.attention.head_count; a number above 0"),
        ({"without": "llama.attention.head_count"}, "its metadata lack llama.attention.head_count; a number"),
        ({"without": "llama.embedding_length"}, "its metadata lack llama.embedding_length; a number above 0"),
        ({"without": "tokenizer.ggml.tokens"}, "its metadata lack tokenizer.ggml.tokens"),
        ({"without": "tokenizer.ggml.merges"}, "its metadata lack tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["a nothing"]}, "its tokenizer.ggml.merges are not of its tokens .*nothing"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "its tokenizer.ggml.token_type are 2, and it has 330 tokens"),
        ({"tokenizer.ggml.bos_token_id": 330}, "its tokenizer.ggml.bos_token_id is 330, and it has 330 tokens"),
        ({"tokenizer.ggml.eos_token_id": 340}, "its tokenizer.ggml.eos_token_id is 340, and it has 330 tokens"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_its_fault(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    _, folder = make_checkpoint(tmp_path)
    without, drop, add = ([str(changes[what])] if what in changes else [] for what in ("without", "drop", "add"))
    values = {key: value for key, value in changes.items() if "." in key}
    more = dict.fromkeys(add, np.zeros(3, np.float32))
    path = edited(written(folder), tmp_path / "other.gguf", values, without, drop, more)
    with pytest.raises(Unfit, match=rf"^{path}: {message}"):
        gguf_file.load(path)


def test_more_experts_than_there_are_numbers_are_refused_before_they_are_listed(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path, odd.make_grouped_mixture)
    path = edited(written(folder), tmp_path / "other.gguf", {"qwen3moe.expert_count": 2**18})
    with pytest.raises(Unfit, match="say that it has 786,435 layers and experts, more than its 39 tensors hold"):
        gguf_file.load(path)


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_a_number_for_each_layer_is_refused(key: str, tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path)
    reader = gguf.GGUFReader(written(folder))
    found = {name: field.contents() for name, field in reader.fields.items()}
    with pytest.raises(Unfit, match=f"its {key} has a number for each layer; a model with one for all alone"):
        config_from({**found, f"llama.{key}": [6, 6, 6]}, (SIZE, 42), tied=False, factors=None)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path)
    whole = written(folder).read_bytes()
    path = tmp_path / "damaged.gguf"
    for content in (b"no GGUF file at all", whole[: len(whole) // 2], whole[:40]):
        path.write_bytes(content)
        with pytest.raises(Unfit, match=rf"^{path}: damaged, or no GGUF file"):
            gguf_file.load(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (struct.pack("<IQ", GGUFValueType.UINT32, 2**60), "a list of 1,152,921,504,606,846,976 in a file of 49 bytes"),
        (struct.pack("<IQ", GGUFValueType.ARRAY, 1) * 3000, "a list of lists in its metadata"),
    ],
    ids=["long", "nested"],
)
def test_a_list_that_the_file_cannot_hold_is_not_followed(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<I", GGUFValueType.ARRAY)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + content)
    with pytest.raises(Unfit, match=rf"^{path}: damaged, or no GGUF file \({said}\)$"):
        gguf_file.load(path)


def test_a_model_in_several_files_is_read_as_one_from_the_first(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path)
    whole = written(folder)
    parts = split(whole, tmp_path / "model.gguf")
    assert len(parts) == 3
    loaded, expected = gguf_file.load(parts[0]), gguf_file.load(whole)
    assert (loaded.config, loaded.tokenizer) == (expected.config, expected.tokenizer)
    assert loaded.state.keys() == expected.state.keys()
    assert all(torch.equal(loaded.state[name], tensor) for name, tensor in expected.state.items())
    # The second one holds tensors, or it would show nothing.
    assert gguf.GGUFReader(parts[1]).tensors
    with pytest.raises(Unfit, match=f"^{parts[1]}: it is a part of a model; the first part is {parts[0].name}$"):
        gguf_file.load(parts[1])
    content = parts[2].read_bytes()
    parts[2].write_bytes(content[:100])
    with pytest.raises(Unfit, match=f"^{parts[0]}: {parts[2].name}: damaged, or no GGUF file"):
        gguf_file.load(parts[0])
    parts[2].write_bytes(whole.read_bytes())
    with pytest.raises(Unfit, match=f"{parts[2].name} says that it is one of 1 parts, and its name says 3$"):
        gguf_file.load(parts[0])
    (tmp_path / "model-00001-of-00000.gguf").write_bytes(whole.read_bytes())
    assert gguf_file.load(tmp_path / "model-00001-of-00000.gguf").config == expected.config
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(Unfit, match="one tensor lies in two of its parts"):
        gguf_file.load(parts[0])
    parts[2].unlink()
    with pytest.raises(Unfit, match=f"it is the first of 3 parts, and {parts[2].name} is missing beside it$"):
        gguf_file.load(parts[0])
