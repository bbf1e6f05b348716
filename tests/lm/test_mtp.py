"""Multi-token prediction against its equations (arXiv 2412.19437, 21 to 25), and where its weights lie on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd import ODD, make_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lm import hugging_face
from lm.config import LatentConfig
from lm.model import LanguageModel


def make(depths: int = 1, **changes: Any) -> LanguageModel:
    model = make_model(num_nextn_predict_layers=depths, **changes).train()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Norms of one would hide which of them is taken.
            if value.dim() == 1:
                value += 0.3 * torch.randn(value.shape, generator=generator)
            elif "eh_proj" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    model.mtp_loss_weight = 0.7
    return model


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(5))


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def _logits_of_further(model: LanguageModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Returns for each depth the logits [T - depth, V] of one window of T + 1 tokens, position by position."""
    length = len(tokens) - 1
    hidden = model.model(tokens[:-1].unsqueeze(0))[0]
    found = []
    for depth, further in enumerate(model.mtp, start=1):
        entering = [
            further.eh_proj.weight
            @ torch.cat(
                [
                    _normed(model.model.embed_tokens.weight[tokens[place + depth]], further.enorm.weight),
                    _normed(hidden[place], further.hnorm.weight),
                ]
            )
            for place in range(length - depth)
        ]
        cos, sin = model.model.rotations[:, : length - depth]
        hidden = further.block(torch.stack(entering).unsqueeze(0), cos, sin)[0]
        found.append(_normed(hidden, further.norm.weight) @ model.lm_head.weight.T)
    return found


@pytest.mark.parametrize("depths", [1, 2])
def test_the_loss_is_that_of_the_equations(depths: int, windows: torch.Tensor) -> None:
    model = make(depths)
    losses = [[F.cross_entropy(model(window[None, :-1])[0], window[1:])] for window in windows]
    for found, window in zip(losses, windows, strict=True):
        for depth, logits in enumerate(_logits_of_further(model, window), start=1):
            found.append(F.cross_entropy(logits, window[depth + 1 :]))
    means = torch.stack([torch.stack(found) for found in losses]).mean(dim=0)
    check_gradients(model, model.loss(windows), means[0] + 0.7 * means[1:].mean())
    # What is told is the loss of the text, in training too.
    torch.testing.assert_close(model.loss(windows), means[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.eval().loss(windows), means[0], atol=1e-5, rtol=1e-5)


def test_only_what_is_to_be_learned_counts(windows: torch.Tensor) -> None:
    model = make()
    learned = torch.zeros_like(windows)
    learned[0, 4:7] = learned[1, 11] = 1
    own = further = torch.zeros(())
    for window, counts in zip(windows, learned, strict=True):
        own = own + (F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none") * counts[1:]).sum()
        (logits,) = _logits_of_further(model, window)
        further = further + (F.cross_entropy(logits, window[2:], reduction="none") * counts[2:]).sum()
    # The mean over all positions, of which the others add nothing.
    expected = own / (2 * 11) + 0.7 * further / (2 * 10)
    found = model.loss(torch.stack([windows, learned], dim=1))
    torch.testing.assert_close(found, own / (2 * 11), atol=1e-5, rtol=1e-5)
    check_gradients(model, found, expected)


def check_gradients(model: LanguageModel, loss: torch.Tensor, expected: torch.Tensor) -> None:
    weights = dict(model.named_parameters())
    found, wanted = (torch.autograd.grad(value, list(weights.values())) for value in (loss, expected))
    for name, one, other in zip(weights, found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)


def test_no_token_is_predicted_from_itself(windows: torch.Tensor) -> None:
    model, seen = make(), []
    loss_of = model.loss_of
    model.loss_of = lambda x, targets: (seen.append(x.detach()), loss_of(x, targets))[1]  # type: ignore[method-assign]
    changed = windows.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 100
    for ids in (windows, changed):
        model.loss(ids)
    # Token 7 is the next one of position 6, and two ahead of position 5.
    assert torch.equal(seen[1][:, :6], seen[3][:, :6])
    assert not torch.isclose(seen[1][:, 6:], seen[3][:, 6:]).all(dim=-1).any()


def test_it_teaches_the_decoder_too(windows: torch.Tensor) -> None:
    model = make()
    model.loss(windows).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.mtp.parameters())
    whole = {name: value.grad.clone() for name, value in model.model.named_parameters() if value.grad is not None}
    model.zero_grad()
    model.mtp_loss_weight = 0.0
    model.loss(windows).backward()
    for name, value in model.model.named_parameters():
        assert value.grad is not None
        assert not torch.equal(value.grad, whole[name]), name


def test_what_is_counted_as_the_model_is_what_is_deployed() -> None:
    with_it, without = make(), make_model()
    assert with_it.parameter_counts() == without.parameter_counts()
    assert without.active_in_mtp() == 0
    block = with_it.mtp[0].block
    inactive = 5 / 8 * sum(value.numel() for value in block.mlp.experts.parameters())
    own = sum(value.numel() for value in with_it.mtp.parameters())
    assert with_it.active_in_mtp() == own - inactive + with_it.lm_head.weight.numel()


@pytest.mark.parametrize("tied", [False, True])
def test_on_disk_it_is_the_layer_after_the_last(tied: bool, tokenizer_file: Path, tmp_path: Path) -> None:
    model = make(tie_word_embeddings=tied)
    hugging_face.save(model, tokenizer_file, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = {name.removeprefix("model.layers.3.") for name in tensors if name.startswith("model.layers.3.")}
    published = {
        "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight",
        "embed_tokens.weight", "input_layernorm.weight", "self_attn.o_proj.weight", "mlp.experts.7.up_proj.weight",
        "mlp.gate.e_score_correction_bias",
    }  # fmt: skip
    assert published < names
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], model.lm_head.weight)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1

    again = hugging_face.load(tmp_path, mtp=True)
    assert hugging_face.check(tmp_path, mtp=True) == again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    (tmp_path / "again").mkdir()
    hugging_face.save(again, tokenizer_file, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()

    deployed = hugging_face.load(tmp_path)
    assert not len(deployed.mtp)
    assert deployed.config.num_nextn_predict_layers == 0  # type: ignore[union-attr]
    ids = torch.arange(9).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(deployed.eval()(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_that_only_says_so_has_none(tokenizer_file: Path, tmp_path: Path) -> None:
    # As transformers writes it, which passes these layers over.
    hugging_face.save(make(), tokenizer_file, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    others = {name: value for name, value in tensors.items() if not name.startswith("model.layers.3.")}
    save_file(others, tmp_path / "model.safetensors")
    assert hugging_face.check(tmp_path, mtp=True) == make_model().config
    # But half of one is not none.
    del tensors["model.layers.3.eh_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(hugging_face.Unusable, match=r"without model\.layers\.3\.eh_proj\.weight"):
        hugging_face.check(tmp_path, mtp=True)


def test_deepseek_v2_has_none() -> None:
    shape = {**ODD, "model_type": "deepseek_v2", "norm_topk_prob": False, "num_nextn_predict_layers": 1}
    with pytest.raises(ValidationError, match="it is a key of deepseek_v3, not of a deepseek_v2; remove it"):
        LatentConfig.model_validate(shape)
