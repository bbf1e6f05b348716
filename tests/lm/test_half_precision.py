"""Every family learns in half precision: products in 16 bits, and gradients that come close to those of fp32."""

import torch

from lm.model import LanguageModel


def gradients(model: LanguageModel, windows: torch.Tensor, kind: torch.dtype) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", kind, enabled=kind != torch.float32):
        loss = model.loss(windows)
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_a_model_learns_in_half_precision_what_it_learns_in_full(model: LanguageModel, ids: torch.Tensor) -> None:
    model.train()
    read: set[torch.dtype] = set()
    expected = gradients(model, ids, torch.float32)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, operands: read.add(operands[0].dtype))
    found = gradients(model, ids, torch.bfloat16)
    # What attention reads and gives is of 16 bits, biases and rotations or not.
    assert read == {torch.bfloat16}
    assert found.keys() == expected.keys()
    whole = [torch.cat([value.flatten() for value in every.values()]) for every in (found, expected)]
    # A router may choose another expert for a token where two are nearly alike.
    assert torch.cosine_similarity(*whole, dim=0) > 0.95
