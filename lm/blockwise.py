"""Products of weights and activations that share a scale in blocks of inputs: as close as 8 bits come, or in 4 bits.

Weights: 8 or 4 bits, symmetric, a scale a block. Activations: signed 8 bits, symmetric, a scale a block, rounded when
they are multiplied. This is what onnxruntime's ``MatMulNBits`` computes at ``accuracy_level`` 4, and llama.cpp, in
blocks of 32, with its Q8_0 and Q4_0 weights (ggml-quants.c); ``QMoE`` does it for all experts of a layer. Gradients
pass straight through (arXiv 1308.3432).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lm.graph import FLOAT, SMALLEST_SCALE, Graph, rounded_in_blocks
from lm.scheme import Levels, Operand

# onnxruntime's operator for all experts of a layer.
MIXTURE = "QMoE"
# Which of its inputs weighs what each expert gives.
GATES = 14
# Of MatMulNBits: activations are rounded to 8 bits.
ACCURACY_LEVEL = 4


def quantize_weight(weight: torch.Tensor, bits: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``weight`` [..., in] as integers [..., blocks, size] and their scales [..., blocks, 1], both fp32.

    The last block is filled up with zeros. 8 bits hold -127 ... 127, 4 bits -7 ... 7.
    """
    blocks = _blocks(weight.float(), size)
    scales = (blocks.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=SMALLEST_SCALE)
    return (blocks / scales).round(), scales


class _FakeQuantWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, bits: int, size: int) -> torch.Tensor:
        integers, scales = quantize_weight(weight, bits, size)
        return (integers * scales).flatten(-2)[..., : weight.shape[-1]]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


class _FakeQuantActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: int) -> torch.Tensor:
        blocks = _blocks(x.float(), size)
        scales = blocks.abs().amax(dim=-1, keepdim=True) / 127
        # By the reciprocal, as the kernel does it: a quotient may round to the other side.
        inverse = torch.where(scales > 0, 1 / scales, 0)
        return ((blocks * inverse).round() * scales).flatten(-2)[..., : x.shape[-1]]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.pad(x, [0, -x.shape[-1] % size]).unflatten(-1, (-1, size))


def fake_quant_weight(weight: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Returns ``weight`` [out, in] rounded in blocks of ``size``, in fp32. Twin of what ``Blockwise.lower`` stores."""
    result: torch.Tensor = _FakeQuantWeight.apply(weight, bits, size)
    return result


def fake_quant_activations(x: torch.Tensor, size: int) -> torch.Tensor:
    """Returns ``x`` [..., K] rounded to 8 bits in blocks of ``size``, in fp32. Twin of what ``MatMulNBits`` does."""
    result: torch.Tensor = _FakeQuantActivations.apply(x, size)
    return result


@dataclass(frozen=True)
class Blockwise:
    """onnxruntime's ``MatMulNBits``: weights of ``bits`` bits in blocks of ``size`` inputs, a power of 2 from 32 on."""

    bits: Literal[4, 8]
    size: int
    operator: str = "MatMulNBits"

    @property
    def levels(self) -> Levels:
        return Levels(2 ** (self.bits - 1) - 1, self.size)

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(fake_quant_activations(x, self.size), fake_quant_weight(weight, self.bits, self.size))

    def operand(self, graph: Graph, x: str) -> Operand:
        return (x,)

    def lower(self, graph: Graph, name: str, weight: torch.Tensor, x: Operand) -> str:
        integers, scales = self._quantize(weight)
        return graph.op(
            self.operator,
            *x,
            graph.weight(self.stored(name), self._pack(integers)),
            graph.weight(f"{name}.scales", scales.squeeze(-1).numpy()),
            domain="com.microsoft",
            **self.product_attributes(*weight.shape),
        )

    def mixture(
        self, graph: Graph, name: str, gate_up: torch.Tensor, down: torch.Tensor, x: str, gates: str, chosen: int
    ) -> str:
        """Returns [N, D] in the graph: what the experts ``gate_up`` [E, 2F, D] and ``down`` [E, D, F] make of ``x``.

        ``gates`` [N, E] weighs them, 0 but for the ``chosen`` of each token. D must be a multiple of ``size``. Computes
        for each expert what :meth:`lower` does, in one node, which reads the weights of those alone that were chosen.
        """
        missing = -down.shape[-1] % self.size
        # Rows of gate and up in turns. What fills up the blocks gives 0 and meets 0.
        pairs = F.pad(gate_up.detach().unflatten(1, (2, -1)), [0, 0, 0, missing]).transpose(1, 2).flatten(1, 2)
        operands = []
        for part, weight in (("gate_up_proj", pairs), ("down_proj", F.pad(down.detach(), [0, missing]))):
            integers, scales = self._quantize(weight)
            packed = self._pack(integers).reshape(*weight.shape[:-1], -1)
            operands += [
                graph.weight(self.stored(f"{name}.{part}"), packed),
                graph.weight(f"{name}.{part}.scales", scales.squeeze(-1).numpy()),
                "",
            ]
        nothing = [""] * (GATES - 2 - len(operands))
        # Those whose gates are largest are those that the router chose, and no others.
        attributes = {"domain": "com.microsoft", "k": chosen, **self.mixture_attributes()}
        return graph.op(MIXTURE, x, gates, *operands, *nothing, gates, **attributes)

    def product_attributes(self, outputs: int, inputs: int) -> dict[str, int | float | str]:
        """The attributes that decide what ``MatMulNBits`` computes with a given weight [outputs, inputs]."""
        return {
            "N": outputs,
            "K": inputs,
            "bits": self.bits,
            "block_size": self.size,
            "accuracy_level": ACCURACY_LEVEL,
        }

    def mixture_attributes(self) -> dict[str, int | float | str]:
        """The attributes that decide what ``QMoE`` computes with given weights."""
        return {
            "expert_weight_bits": self.bits,
            "block_size": self.size,
            "accuracy_level": ACCURACY_LEVEL,
            "quant_type": "int",
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": 0,
        }

    def rounded(self, graph: Graph, x: str, width: int) -> str:
        return rounded_in_blocks(graph, x, width, self.size)

    def constant(self, graph: Graph, name: str, weight: torch.Tensor) -> str:
        # A byte a number whatever the weight has: the graph knows no product of blocks that could be sliced into heads.
        integers, scales = self._quantize(weight)
        values = graph.op("Cast", graph.weight(self.stored(name), integers.to(torch.int8).numpy()), to=FLOAT)
        rounded = graph.op("Mul", values, graph.weight(f"{name}.scales", scales.numpy()))
        return graph.op(
            "Slice", graph.op("Flatten", rounded), graph.ints(0), graph.ints(weight.shape[1]), graph.ints(1)
        )

    def stored(self, name: str) -> str:
        return f"{name}.int{self.bits}"

    def _quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_weight(weight.detach(), self.bits, self.size)

    def _pack(self, integers: torch.Tensor) -> npt.NDArray[np.uint8]:
        # Unsigned around half the range; of two 4-bit numbers the first lies in the low half of its byte.
        shifted = (integers.numpy() + 2 ** (self.bits - 1)).astype(np.uint8)
        return shifted if self.bits == 8 else shifted[..., 0::2] | (shifted[..., 1::2] << 4)
