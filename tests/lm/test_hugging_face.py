"""Parity with transformers on the same weights."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from odd import make_grouped, make_grouped_mixture, make_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import AutoModelForCausalLM, PreTrainedModel

from lm import hugging_face
from lm.model import LanguageModel


def _in_transformers(model: LanguageModel, tokenizer_file: Path, folder: Path) -> PreTrainedModel:
    folder.mkdir()
    hugging_face.save(model, tokenizer_file, folder)
    # The grouped kernel wants sizes that are multiples of four.
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def check_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_transformers_computes_the_same_logits(
    model: LanguageModel, tokenizer_file: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    theirs = _in_transformers(model, tokenizer_file, tmp_path / "float")
    assert theirs.config.model_type == model.config.model_type
    with torch.no_grad():
        check_logits(model(ids), theirs(ids).logits)


def test_a_llama_that_yarn_stretches_computes_what_it_does_in_transformers(
    tokenizer_file: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    model = make_grouped(rope_scaling=yarn)
    theirs = _in_transformers(model, tokenizer_file, tmp_path / "float")
    with torch.no_grad():
        check_logits(model(ids), theirs(ids).logits)


def test_a_disk_without_room_for_weights_is_told_as_one(
    tokenizer_file: Path, tmp_path: Path, small_disk: Callable[[Path, int], None]
) -> None:
    small_disk(tmp_path / "disk", 4)
    with pytest.raises(OSError, match="No space left on device") as told:
        hugging_face.save(make_grouped(), tokenizer_file, tmp_path / "disk")
    assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(tmp_path / "disk/model.safetensors"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_in_which_each_text_has_room_compute_what_they_do_in_transformers(
    family: str, tokenizer_file: Path, tmp_path: Path
) -> None:
    model = make_grouped(model_type=family, max_position_embeddings=33)
    ids = torch.randint(0, 100, (1, 33), generator=torch.Generator().manual_seed(5))
    hugging_face.save(model, tokenizer_file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def said(window: int) -> torch.Tensor:
        windows = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
        (tmp_path / "config.json").write_text(json.dumps({**config, **windows}))
        return AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits

    with torch.no_grad():
        assert not torch.allclose(said(32), model(ids), atol=1e-4)
        theirs = said(33)
        check_logits(hugging_face.load(tmp_path)(ids), theirs)


def test_a_row_that_is_filled_up_at_its_end_is_as_transformers_masks_it(
    model: LanguageModel, tokenizer_file: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    theirs = _in_transformers(model, tokenizer_file, tmp_path / "float")
    mask = torch.ones_like(ids)
    mask[0, 21:] = 0
    with torch.no_grad():
        ours, logits = model(ids), theirs(ids, attention_mask=mask).logits
    check_logits(ours[mask == 1], logits[mask == 1])


def test_transformers_writes_the_same_text(
    model: LanguageModel, tokenizer_file: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    theirs = _in_transformers(model, tokenizer_file, tmp_path / "float")
    prompt = ids[:1, :9]
    told = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, min_new_tokens=32, do_sample=False
    )
    with torch.no_grad():
        for _ in range(32):
            logits = model(prompt)[:, -1]
            # `min_new_tokens` keeps the end of the text away.
            logits[:, model.config.eos_token_id] = float("-inf")
            prompt = torch.cat([prompt, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(prompt, told)


def test_transformers_computes_the_same_gradients(
    model: LanguageModel, tokenizer_file: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    theirs = _in_transformers(model, tokenizer_file, tmp_path / "float")
    model.loss(ids).backward()
    theirs(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:].contiguous()).loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_what_transformers_saved_comes_back_byte_for_byte(
    model: LanguageModel, tokenizer_file: Path, tmp_path: Path
) -> None:
    theirs = _in_transformers(model, tokenizer_file, tmp_path / "float")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    (tmp_path / "ours").mkdir()
    hugging_face.save(hugging_face.load(tmp_path / "theirs"), tokenizer_file, tmp_path / "ours")
    before, after = _tensors(tmp_path / "theirs"), _tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_large_weights_are_several_files_that_transformers_reads(
    model: LanguageModel, tokenizer_file: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    hugging_face.save(model, tokenizer_file, tmp_path, bytes_a_file=60_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    with torch.no_grad():
        check_logits(model(ids), theirs(ids).logits)
    assert hugging_face.load(tmp_path).config == model.config


def test_weights_of_16_bits_become_fp32(tokenizer_file: Path, tmp_path: Path) -> None:
    model = make_grouped()
    hugging_face.save(model, tokenizer_file, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    loaded = hugging_face.load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name


def test_what_a_checkpoint_says_about_its_tokenizer_is_kept(tokenizer_file: Path, tmp_path: Path) -> None:
    origin, kept = tmp_path / "origin", tmp_path / "kept"
    for folder in (origin, kept):
        folder.mkdir()
    (origin / "config.json").write_text("{}")
    texts = {"tokenizer_config.json": '{"x": 1}', "chat_template.jinja": "{{ x }}", "generation_config.json": "{ }"}
    for name, text in texts.items():
        (origin / name).write_text(text)
    hugging_face.save(make_grouped(), tokenizer_file, kept, origin)
    assert {name: (kept / name).read_text() for name in texts} == texts


def test_a_head_that_is_said_to_be_the_embedding_has_to_be_it(tokenizer_file: Path, tmp_path: Path) -> None:
    hugging_face.save(make_grouped(tie_word_embeddings=True), tokenizer_file, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    for head in (embedding.bfloat16(), torch.zeros_like(embedding)):
        save_file({**tensors, "lm_head.weight": head}, file)
        with pytest.raises(hugging_face.Unusable, match=r"config\.json: tie_word_embeddings is true, and the files"):
            hugging_face.check(tmp_path)
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file)
    assert hugging_face.check(tmp_path).tie_word_embeddings


def test_all_ends_of_a_text_are_kept_and_its_beginning_is_that_of_generation(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    origin, kept = tmp_path / "origin", tmp_path / "kept"
    for folder in (origin, kept):
        folder.mkdir()
    hugging_face.save(make_grouped(bos_token_id=100, eos_token_id=100), tokenizer_file, origin)
    config = json.loads((origin / "config.json").read_text())
    (origin / "config.json").write_text(json.dumps({**config, "eos_token_id": [100, 7]}))
    (origin / "generation_config.json").unlink()
    hugging_face.save(hugging_face.load(origin), tokenizer_file, kept, origin)
    assert json.loads((kept / "generation_config.json").read_text())["eos_token_id"] == [100, 7]
    assert json.loads((kept / "config.json").read_text())["eos_token_id"] == 100
    # As of DeepSeek-R1-Distill-Qwen, whose configuration has what Qwen begins with.
    (origin / "generation_config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": 100}))
    assert hugging_face.load(origin).config.bos_token_id == 5


@pytest.mark.parametrize(
    ("known", "then"), [(100, [100, 7, 8]), ([5, 8], [5, 8, 7]), ([7, 8], [7, 8]), (None, [100, 7, 8])]
)
def test_what_ends_an_answer_ends_a_text(known: object, then: object, tokenizer_file: Path, tmp_path: Path) -> None:
    origin, kept = tmp_path / "origin", tmp_path / "kept"
    for folder in (origin, kept):
        folder.mkdir()
    model = make_grouped(bos_token_id=100, eos_token_id=100)
    hugging_face.save(model, tokenizer_file, origin)
    content = json.dumps({"eos_token_id": known, "top_p": 0.8})
    (origin / "generation_config.json").write_text(content)
    hugging_face.save_companions(model.config, tokenizer_file, kept, origin, [7, 8])
    assert json.loads((kept / "generation_config.json").read_text()) == {"eos_token_id": then, "top_p": 0.8}
    hugging_face.save_companions(model.config, tokenizer_file, kept, origin)
    assert (kept / "generation_config.json").read_text() == content


@pytest.mark.parametrize(
    ("generation", "then"),
    [
        (None, {"bos_token_id": 100, "pad_token_id": 100, "_from_model_config": True}),
        ({"top_p": 0.8}, {"top_p": 0.8}),
        ({"eos_token_id": []}, {}),
    ],
)
@pytest.mark.parametrize("taught", [[], [8, 8], [7]])
def test_several_ends_that_the_configuration_alone_names_are_kept(
    generation: dict[str, object] | None,
    then: dict[str, object],
    taught: list[int],
    tokenizer_file: Path,
    tmp_path: Path,
) -> None:
    origin, kept, again = folders = [tmp_path / name for name in ("origin", "kept", "again")]
    for folder in folders:
        folder.mkdir()
    model = make_grouped(bos_token_id=100, eos_token_id=100)
    hugging_face.save(model, tokenizer_file, origin)
    config = json.loads((origin / "config.json").read_text())
    (origin / "config.json").write_text(json.dumps({**config, "eos_token_id": [100, 7]}))
    (origin / "generation_config.json").unlink()
    if generation is not None:
        (origin / "generation_config.json").write_text(json.dumps(generation))
    hugging_face.save_companions(model.config, tokenizer_file, kept, origin, taught)
    ends = [100, 7, *sorted({*taught} - {7})]
    assert json.loads((kept / "generation_config.json").read_text()) == {**then, "eos_token_id": ends}
    # The next night starts from that one and teaches the same.
    hugging_face.save_companions(model.config, tokenizer_file, again, kept, taught)
    assert (again / "generation_config.json").read_bytes() == (kept / "generation_config.json").read_bytes()


@pytest.mark.parametrize("pad", [7, 0, None])
def test_what_fills_up_batches_stays_what_it_was(pad: int | None, tokenizer_file: Path, tmp_path: Path) -> None:
    origin, kept = tmp_path / "origin", tmp_path / "kept"
    for folder in (origin, kept):
        folder.mkdir()
    model = make_grouped(bos_token_id=99, eos_token_id=100)
    hugging_face.save(model, tokenizer_file, origin)
    config = json.loads((origin / "config.json").read_text())
    assert config["pad_token_id"] == 100
    (origin / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    (origin / "generation_config.json").unlink()
    hugging_face.save(model, tokenizer_file, kept, origin)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((kept / name).read_text())["pad_token_id"] == pad
    embedding = AutoModelForCausalLM.from_pretrained(kept).get_input_embeddings()
    assert embedding.padding_idx == pad


def test_a_tokenizer_whose_vocabulary_is_a_list_is_written_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(Unigram([("<s>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "abc")], 0, False))
    tokenizer.save(str(tmp_path / "unigram.json"))
    (tmp_path / "out").mkdir()
    model = make_grouped(bos_token_id=0, eos_token_id=1)
    hugging_face.save_companions(model.config, tmp_path / "unigram.json", tmp_path / "out")
    written = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert [written[f"{name}_token"] for name in ("bos", "eos", "pad")] == ["<s>", "</s>", "</s>"]


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"], tensors["model.norm.weight"]


def _with_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2)


def _with_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.zeros(7, 48)


def _as_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without, "model.safetensors: without model.layers.1.mlp.experts.3.up_proj.weight, model.norm.weight, which"),
        (_with_more, "a deepseek_v3 of this config.json has no model.layers.3.mlp.up_proj.weight"),
        (_with_another_shape, r"model.embed_tokens.weight is \[7, 48\]; config.json makes it \[101, 48\]"),
        (_as_integers, "lm_head.weight is I8; weights of floating point are needed"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, said: str, tokenizer_file: Path, tmp_path: Path) -> None:
    hugging_face.save(make_model(), tokenizer_file, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    for read in (hugging_face.check, hugging_face.load):
        with pytest.raises(hugging_face.Unusable, match=said):
            read(tmp_path)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (make_grouped, {"num_hidden_layers": 20_000}),
        (make_grouped_mixture, {"num_experts": 20_000}),
        (make_model, {"n_routed_experts": 20_000}),
        (lambda: make_model(num_nextn_predict_layers=1), {"num_nextn_predict_layers": 20_000}),
    ],
)
def test_more_layers_and_experts_than_there_are_tensors_are_refused_before_they_are_built(
    make: Any, changes: dict[str, int], tokenizer_file: Path, tmp_path: Path
) -> None:
    hugging_face.save(make(), tokenizer_file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(hugging_face.Unusable, match=r"config\.json: it has [\d,]+ layers and experts, more than the "):
        hugging_face.check(tmp_path, mtp=True)


def test_a_checkpoint_is_checked_without_the_rotations_of_all_its_positions(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hugging_face.save(make_grouped(), tokenizer_file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10_485_760}))
    monkeypatch.setattr("lm.weights.rotations_of", None)
    assert hugging_face.check(tmp_path).max_position_embeddings == 10_485_760


def test_a_configuration_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(hugging_face.Unusable, match=r"^config\.json: not JSON \("):
        hugging_face.check(tmp_path)


def test_layers_that_predict_further_tokens_are_left_out(tokenizer_file: Path, tmp_path: Path) -> None:
    model = make_model()
    hugging_face.save(model, tokenizer_file, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    _with_more(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert hugging_face.load(tmp_path).config == model.config


def test_a_pickle_is_not_opened(tokenizer_file: Path, tmp_path: Path) -> None:
    hugging_face.save(make_grouped(), tokenizer_file, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(hugging_face.Unusable, match=r"pytorch_model\.bin: a pickle"):
        hugging_face.load(tmp_path)


def test_a_damaged_file_is_named(tokenizer_file: Path, tmp_path: Path) -> None:
    hugging_face.save(make_grouped(), tokenizer_file, tmp_path, bytes_a_file=60_000)
    file = max(tmp_path.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(hugging_face.Unusable, match=f"{file.name}: damaged"):
        hugging_face.load(tmp_path)
    file.unlink()
    with pytest.raises(hugging_face.Unusable, match=rf"{file.name}: no such file, though model.safetensors.index.json"):
        hugging_face.load(tmp_path)


def test_a_saved_model_loads_back_bit_for_bit(model: LanguageModel, tokenizer_file: Path, tmp_path: Path) -> None:
    hugging_face.save(model, tokenizer_file, tmp_path)
    loaded = hugging_face.load(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_model_to_be_read_leaves_in_its_file_what_lies_there_as_it_is_computed_with(
    model: LanguageModel, tokenizer_file: Path, tmp_path: Path
) -> None:
    hugging_face.save(model, tokenizer_file, tmp_path)
    file = tmp_path / "model.safetensors"
    for kind in (torch.float32, torch.bfloat16):
        save_file({name: value.to(kind) for name, value in load_file(file).items()}, file)
        copied, mapped = hugging_face.load(tmp_path), hugging_face.mapped(tmp_path)
        # They outlive the name, as where a version is checked out.
        file.rename(tmp_path / "old.safetensors")
        save_file(load_file(tmp_path / "old.safetensors"), file)
        for (name, expected), found in zip(copied.state_dict().items(), mapped.state_dict().values(), strict=True):
            assert torch.equal(found, expected), name
            as_it_is = name in dict(mapped.named_parameters(remove_duplicate=False)) and "mlp.experts" not in name
            assert _lies_in_a_file(found) == (as_it_is and kind == torch.float32), name


def _lies_in_a_file(tensor: torch.Tensor) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return ".safetensors" in line
    raise AssertionError("it lies nowhere")


def test_each_expert_has_its_own_matrices_on_disk(model: LanguageModel, tokenizer_file: Path, tmp_path: Path) -> None:
    hugging_face.save(model, tokenizer_file, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stacked = [name for name in model.state_dict() if name.endswith("experts.gate_up_proj")]
    for name in stacked:
        up = tensors[name.replace("gate_up_proj", "5.up_proj.weight")]
        assert torch.equal(up, model.state_dict()[name][5, 22:])
    assert not set(stacked) & set(tensors)


def test_saving_twice_gives_the_same_bytes(model: LanguageModel, tokenizer_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        hugging_face.save(model, tokenizer_file, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
