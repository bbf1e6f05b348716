"""INT8 products whose activations are rounded within a range that was fixed when the model was made.

Activations: unsigned 8 bits, asymmetric, one scale and zero point a layer, from :mod:`lm.calibration`. Weights: signed
8 bits, symmetric, one scale an output channel. Nothing about the activations is computed while the model runs, which
is what accelerators ask for that know no other; on a CPU a scale a token (:mod:`lm.per_token`) is much nearer to float.

What lies outside its range is clipped, and no gradient passes there; inside it passes straight through the rounding
(arXiv 1308.3432).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lm.graph import SMALLEST_SCALE, Graph
from lm.per_token import OPERATOR, PerToken, fake_quant_rows, quantize_weight, zero_point
from lm.scheme import Levels, Operand

# Weights are stored as this scheme stores them.
_WEIGHTS = PerToken()


@dataclass(frozen=True)
class Range:
    """The 256 values ``(0 ... 255 - zero) * scale``; ``scale`` is one of fp32."""

    scale: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> "Range":
        """Returns the range that reaches from ``low`` to ``high``, and over 0 in any case."""
        scale = np.float32(max((max(high, 0.0) - min(low, 0.0)) / 255, SMALLEST_SCALE))
        return cls(float(scale), round(-min(low, 0.0) / float(scale)))


class _FakeQuantWithin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, within: Range) -> torch.Tensor:
        # A tensor: on a GPU torch multiplies by the reciprocal of a number, and some values would tip over a boundary.
        level = (x.float() / torch.tensor(within.scale, device=x.device)).round() + within.zero
        ctx.save_for_backward((level < 0) | (level > 255))
        return (level.clamp(0, 255) - within.zero) * within.scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (clipped,) = ctx.saved_tensors
        return grad.masked_fill(clipped, 0), None


def fake_quant_within(x: torch.Tensor, within: Range) -> torch.Tensor:
    """Returns ``x`` rounded to the nearest value of ``within``, in fp32. Twin of :meth:`Static.operand`."""
    result: torch.Tensor = _FakeQuantWithin.apply(x, within)
    return result


@dataclass(frozen=True)
class Static:
    """u8 activations within a fixed range, s8 weights a channel: onnxruntime's ``MatMulIntegerToFloat``.

    ``within`` None: not calibrated yet, and nothing can be multiplied.
    """

    within: Range | None = None
    operator: str = OPERATOR

    @property
    def levels(self) -> Levels:
        return _WEIGHTS.levels

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(fake_quant_within(x, self._range), fake_quant_rows(weight))

    def operand(self, graph: Graph, x: str) -> Operand:
        """Returns uint8 values [N, K]."""
        return (graph.op("QuantizeLinear", x, *self._constants(graph)),)

    def lower(self, graph: Graph, name: str, weight: torch.Tensor, x: Operand) -> str:
        integers, scales = quantize_weight(weight.detach())
        columns = graph.weight(self.stored(name), integers.numpy().T)
        by_channel = graph.weight(f"{name}.scales", scales.squeeze(-1).numpy())
        scale, zero = self._constants(graph)
        return graph.op(self.operator, *x, columns, scale, by_channel, zero, domain="com.microsoft")

    def rounded(self, graph: Graph, x: str, width: int) -> str:
        return graph.op("DequantizeLinear", *self.operand(graph, x), *self._constants(graph))

    def constant(self, graph: Graph, name: str, weight: torch.Tensor) -> str:
        return _WEIGHTS.constant(graph, name, weight)

    def stored(self, name: str) -> str:
        return _WEIGHTS.stored(name)

    @property
    def _range(self) -> Range:
        if self.within is None:
            raise ValueError("the plan has no ranges yet; lm.calibration.calibrate gives it some")
        return self.within

    def _constants(self, graph: Graph) -> tuple[str, str]:
        return graph.number(self._range.scale), zero_point(graph, self._range.zero)
