"""A graph that knows how each layer of its model is quantized, and the parts that all its layers are made of."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from lm.graph import FLOAT, Graph
from lm.linear import Linear
from lm.norm import RMSNorm
from lm.packing import packable, packed_name
from lm.per_token import PerToken, quantize_weight
from lm.quantization import Plan
from lm.scheme import Rows, Sorted, expert_name


class PlannedGraph(Graph):
    """Adds whole layers as :class:`Graph` adds nodes: each method returns the name of its result.

    Between layers the tokens of all rows lie one after the other: [N, hidden size], N = batch x length.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__("overnight")
        self.plan = plan
        self._shapes: dict[tuple[str | int, ...], str] = {}

    def experts(self, name: str, part: str, weights: torch.Tensor, x: Rows, rows: Sorted) -> str:
        """Multiplies ``x`` [M, in] by ``weights`` [E, out, in], the ``part`` of the experts of the layer ``name``.

        Returns [M, out], each of the ``rows`` multiplied by its own expert's. An expert may have none.
        """
        scheme = self.plan.of(name, f"{name}.{part}")
        if isinstance(scheme, PerToken):
            return scheme.lower_experts(self, name, part, weights, x.operand(scheme), rows)
        apart = (self.ops("Split", one, rows.counts, outputs=len(weights), axis=0) for one in x.operand(scheme))
        products = [
            scheme.lower(self, expert_name(name, index, part), weight, operand)
            for index, (weight, operand) in enumerate(zip(weights, zip(*apart, strict=True), strict=True))
        ]
        return self.op("Concat", *products, axis=0)

    def product(self, name: str, weight: torch.Tensor, x: Rows) -> str:
        """Multiplies ``x`` [N, in] by the ``weight`` [out, in] of the layer ``name``."""
        scheme = self.plan.of(name)
        return scheme.lower(self, name, weight, x.operand(scheme))

    def linear(self, name: str, layer: Linear, x: Rows) -> str:
        """[N, in] to [N, out]. Twin of :class:`lm.linear.Linear`."""
        y = self.product(name, layer.weight, x)
        return y if layer.bias is None else self.op("Add", y, self.weight(f"{name}.bias", array(layer.bias)))

    def packed(self, prefix: str, layers: Mapping[str, Linear], x: Rows) -> str:
        """[N, in] to [N, sum of the layers' out]: the layers ``prefix.NAME`` side by side, as one product if it can be.

        Twin of :func:`lm.linear.stacked`.
        """
        if not packable(self.plan, prefix, layers):
            apart = [self.linear(f"{prefix}.{name}", layer, x) for name, layer in layers.items()]
            return self.op("Concat", *apart, axis=-1)
        name = packed_name(prefix, layers)
        scheme = self.plan.of(f"{prefix}.{next(iter(layers))}")
        weight = torch.cat([layer.weight.detach() for layer in layers.values()])
        y = scheme.lower(self, name, weight, x.operand(scheme))
        if next(iter(layers.values())).bias is None:
            return y
        biases = np.concatenate([array(layer.bias) for layer in layers.values()])
        return self.op("Add", y, self.weight(f"{name}.bias", biases))

    def turned(self, x: str, size: int, turn: torch.Tensor | None) -> str:
        """[N, size] to [N, size]. Twin of :func:`lm.linear.turned`."""
        if turn is None:
            return x
        parts = self.op("Reshape", x, self.ints(-1, len(turn)))
        parts = self.op("MatMul", parts, self.weight(turn_name(len(turn)), array(turn)))
        return self.op("Reshape", parts, self.ints(-1, size))

    def rounded(self, name: str, x: str, width: int) -> str:
        """[N, width] as the product of the layer ``name`` sees it."""
        return self.plan.of(name).rounded(self, x, width)

    def constant(self, name: str, layer: Linear) -> str:
        """The weight [out, in] as the product of the layer ``name`` sees it."""
        return self.plan.of(name).constant(self, name, layer.weight)

    def norm(self, name: str, norm: RMSNorm, x: str) -> str:
        """[..., K] to [..., K]. Twin of :class:`lm.norm.RMSNorm`."""
        if self.plan.norms == "int8":
            integers, scale = quantize_weight(norm.weight.detach())
            as_float = self.op("Cast", self.weight(f"{name}.int8", integers.numpy()), to=FLOAT)
            # onnxruntime computes it when it loads.
            weight = self.op("Mul", as_float, self.weight(f"{name}.scales", array(scale)))
        else:
            weight = self.weight(f"{name}.weight", array(norm.weight))
        return self.op("RMSNormalization", x, weight, axis=-1, epsilon=float(norm.eps or 0.0))

    def unflat(self, rows: str, ids: str, *inner: int) -> str:
        """[batch * length, ...] to [batch, length, *inner], batch and length those of ``ids``."""
        key: tuple[str | int, ...] = (ids, *inner)
        if key not in self._shapes:
            self._shapes[key] = self.op("Concat", self.op("Shape", ids, start=0, end=2), self.ints(*inner), axis=0)
        return self.op("Reshape", rows, self._shapes[key])


def turn_name(width: int) -> str:
    """Returns the initializer that holds the turn of ``width``, one for all layers that have it."""
    return f"turn_{width}"


def array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """Returns ``tensor`` as fp32 for an initializer."""
    values: npt.NDArray[np.float32] = tensor.detach().float().numpy()
    return values
