"""INT8 products with one activation scale a token and one weight scale an output channel.

Activations: unsigned 8 bits, asymmetric, one scale and zero point a token. Weights: signed 8 bits, symmetric, one scale
an output channel. Ranges are taken in fp32. Gradients pass straight through the rounding (arXiv 1308.3432): nothing is
clipped, because each range is that of the very values it scales. Not one scale a tensor, as ``quantize_dynamic`` has
it: a token's result would depend on its batch, and what quantization-aware training learned would be lost.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lm.graph import FLOAT, SMALLEST_SCALE, UINT8, Graph
from lm.scheme import Levels, Operand, Sorted, expert_name


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
        high = x32.amax(dim=-1, keepdim=True).clamp(min=SMALLEST_SCALE)
        scale = (high - low) / 255
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
    """Returns ``x`` [..., K] rounded to 256 levels a token, in fp32. Twin of :meth:`PerToken.operand`."""
    result: torch.Tensor = _FakeQuantTokens.apply(x)
    return result


def fake_quant_rows(weight: torch.Tensor) -> torch.Tensor:
    """Returns ``weight`` [..., in] rounded to 255 levels a row, in fp32. Twin of the int8 initializers of the graph."""
    result: torch.Tensor = _FakeQuantRows.apply(weight)
    return result


# In the middle of 0 ... 255. Sums of activations less this are as good as always exact in fp32: below 2^24.
MIDDLE = 128
# Of ONNX it is `MatMulInteger`, with what turns integers to fp32 behind it: here that takes no pass of its own.
OPERATOR = "MatMulIntegerToFloat"


@dataclass(frozen=True)
class PerToken:
    """u8 activations a token, s8 weights a channel: onnxruntime's ``MatMulIntegerToFloat``."""

    operator: str = OPERATOR

    @property
    def levels(self) -> Levels:
        return Levels(127, None)

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(fake_quant_tokens(x), fake_quant_rows(weight))

    def operand(self, graph: Graph, x: str) -> Operand:
        """Returns uint8 values [N, K], their fp32 scales [N, 1], and their zero points less 128 [N, 1] in fp32."""
        values, scale, point = self._quantized(graph, x)
        offset = graph.op("DequantizeLinear", point, graph.number(1.0), zero_point(graph, MIDDLE))
        return values, *(graph.op("Unsqueeze", one, graph.ints(1)) for one in (scale, offset))

    def lower(self, graph: Graph, name: str, weight: torch.Tensor, x: Operand) -> str:
        """(x - zero) @ w = (x - 128) @ w - (zero - 128) * (column sums of w): the operator knows one zero for all."""
        values, scale, offset = x
        product, sums = self._multiplied(graph, name, weight, values)
        return _finished(graph, product, graph.weight(sums_name(name), sums), scale, offset)

    def lower_experts(self, graph: Graph, name: str, part: str, weights: torch.Tensor, x: Operand, rows: Sorted) -> str:
        """Returns [M, out]: ``rows`` by their experts' ``weights`` [E, out, in]. Products alone are one an expert."""
        values, scale, offset = x
        apart = graph.ops("Split", values, rows.counts, outputs=len(weights), axis=0)
        products, sums = zip(
            *(
                self._multiplied(graph, expert_name(name, index, part), weight, of_one)
                for index, (weight, of_one) in enumerate(zip(weights, apart, strict=True))
            ),
            strict=True,
        )
        of_rows = graph.op("Gather", graph.weight(sums_name(f"{name}.{part}"), np.stack(sums)), rows.owners)
        return _finished(graph, graph.op("Concat", *products, axis=0), of_rows, scale, offset)

    def rounded(self, graph: Graph, x: str, width: int) -> str:
        return graph.op("DequantizeLinear", *self._quantized(graph, x), axis=0)

    def constant(self, graph: Graph, name: str, weight: torch.Tensor) -> str:
        integers, scales = quantize_weight(weight.detach())
        values = graph.op("Cast", graph.weight(self.stored(name), integers.numpy()), to=FLOAT)
        return graph.op("Mul", values, graph.weight(f"{name}.scales", scales.numpy()))

    def stored(self, name: str) -> str:
        return f"{name}.int8"

    def _multiplied(
        self, graph: Graph, name: str, weight: torch.Tensor, values: str
    ) -> tuple[str, npt.NDArray[np.float32]]:
        # (x - 128) @ w, and the sums of the columns of w.
        integers, scales = quantize_weight(weight.detach())
        columns, of_columns = integers.numpy().T, scales.squeeze(-1).numpy()
        product = graph.op(
            self.operator,
            values,
            graph.weight(self.stored(name), columns),
            graph.number(1.0),
            graph.weight(f"{name}.scales", of_columns),
            zero_point(graph, MIDDLE),
            domain="com.microsoft",
        )
        return product, (columns.sum(axis=0, dtype=np.float64) * of_columns).astype(np.float32)

    def _quantized(self, graph: Graph, x: str) -> tuple[str, str, str]:
        # Values [N, K], scales [N] and zero points [N].
        low = graph.op("Min", graph.op("ReduceMin", x, graph.ints(-1), keepdims=0), graph.number(0.0))
        high = graph.op("Max", graph.op("ReduceMax", x, graph.ints(-1), keepdims=0), graph.number(SMALLEST_SCALE))
        scale = graph.op("Div", graph.op("Sub", high, low), graph.number(255.0))
        point = graph.op("QuantizeLinear", graph.op("Neg", low), scale, axis=0, output_dtype=UINT8)
        return graph.op("QuantizeLinear", x, scale, point, axis=0), scale, point


def sums_name(name: str) -> str:
    """Returns the initializer that holds the sums of the weight's columns, [out]; of all experts of a part [E, out]."""
    return f"{name}.sums"


def _finished(graph: Graph, product: str, sums: str, scale: str, offset: str) -> str:
    return graph.op("Mul", graph.op("Sub", product, graph.op("Mul", offset, sums)), scale)


def zero_point(graph: Graph, value: int) -> str:
    """Returns the name of a constant zero point of unsigned 8 bits, shared by all who ask for the same."""
    return graph.weight(f"zero_{value}_uint8", np.array(value, np.uint8))
