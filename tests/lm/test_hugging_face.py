"""Parity with transformers on the same weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lm import hugging_face
from lm.model import LanguageModel


def _in_transformers(model: LanguageModel, tokenizer_file: Path, folder: Path) -> PreTrainedModel:
    folder.mkdir()
    hugging_face.save(model, tokenizer_file, folder)
    # The grouped kernel wants sizes that are multiples of four.
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def test_transformers_computes_the_same_logits(
    model: LanguageModel, tokenizer_file: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    theirs = _in_transformers(model, tokenizer_file, tmp_path / "float")
    assert theirs.config.model_type == model.config.model_type
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=3e-5, rtol=1e-5)


def test_transformers_computes_the_same_gradients(
    model: LanguageModel, tokenizer_file: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    theirs = _in_transformers(model, tokenizer_file, tmp_path / "float")
    model.loss(ids).backward()
    theirs(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:].contiguous()).loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_saved_model_loads_back_bit_for_bit(model: LanguageModel, tokenizer_file: Path, tmp_path: Path) -> None:
    hugging_face.save(model, tokenizer_file, tmp_path)
    loaded = hugging_face.load(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


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
