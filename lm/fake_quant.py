"""Quantization that stays in floating point, for training: each function is the twin of one in :mod:`lm.onnx_int8`.

Activations: unsigned 8 bits, asymmetric, one scale and zero point a token. Weights: signed 8 bits, symmetric, one scale
an output channel. Ranges are taken in fp32. Gradients pass straight through the rounding (arXiv 1308.3432): nothing is
clipped, because each range is that of the very values it scales.
"""

from typing import Any

import torch
import torch.nn.functional as F

from lm.feed_forward import Experts
from lm.linear import Embedding, Linear
from lm.model import LanguageModel

# Keeps the scale of an all-zero token or channel from dividing by zero; far below any scale that matters.
SMALLEST_SCALE = 1e-12


def weight_scales(weight: torch.Tensor) -> torch.Tensor:
    """Returns the scales [..., 1] that map each last axis of ``weight`` onto -127 ... 127."""
    return (weight.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``weight`` [..., in] as int8 and its scales [..., 1] in fp32: weight ~ int8 x scale."""
    scales = weight_scales(weight.float())
    return (weight.float() / scales).round().to(torch.int8), scales


class _FakeQuantTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        low = x32.amin(dim=-1, keepdim=True).clamp(max=0)
        high = x32.amax(dim=-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=SMALLEST_SCALE)
        zero = (-low / scale).round()
        return (((x32 / scale).round() + zero).clamp(0, 255) - zero) * scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


class _FakeQuantRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        integers, scales = quantize_weight(weight)
        return integers.float() * scales

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def fake_quant_tokens(x: torch.Tensor) -> torch.Tensor:
    """Returns ``x`` [..., K] rounded to 256 levels a token, in fp32. Twin of ``onnx_int8.quantize_tokens``."""
    result: torch.Tensor = _FakeQuantTokens.apply(x)
    return result


def fake_quant_rows(weight: torch.Tensor) -> torch.Tensor:
    """Returns ``weight`` [..., in] rounded to 255 levels a row, in fp32. Twin of the int8 initializers of the graph."""
    result: torch.Tensor = _FakeQuantRows.apply(weight)
    return result


def fake_quant_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns ``x @ weight.T`` of the rounded operands. Twin of ``onnx_int8.linear``."""
    return F.linear(fake_quant_tokens(x), fake_quant_rows(weight))


def prepare(model: LanguageModel) -> LanguageModel:
    """Makes each linear layer, expert and embedding of ``model`` compute as INT8 will; the routers stay float."""
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            module.project = fake_quant_linear
        elif isinstance(module, Embedding):
            module.table = fake_quant_rows
    return model
