"""A graph that knows how each layer of its model is quantized, and the parts that all its layers are made of."""

import numpy as np
import numpy.typing as npt
import torch

from lm.graph import Graph
from lm.linear import Linear
from lm.norm import RMSNorm
from lm.quantization import Plan
from lm.scheme import Rows


class PlannedGraph(Graph):
    """Adds whole layers as :class:`Graph` adds nodes: each method returns the name of its result."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("overnight")
        self._plan = plan

    def product(self, name: str, weight: torch.Tensor, x: Rows, layer: str | None = None) -> str:
        """Multiplies ``x`` [N, in] by ``weight`` [out, in] as the plan has it for ``layer``, ``name`` if None."""
        scheme = self._plan.of(layer or name)
        return scheme.lower(self, name, weight, x.operand(scheme))

    def linear(self, name: str, layer: Linear, x: Rows) -> str:
        """[N, in] to [N, out]. Twin of :class:`lm.linear.Linear`."""
        y = self.product(name, layer.weight, x)
        return y if layer.bias is None else self.op("Add", y, self.weight(f"{name}.bias", array(layer.bias)))

    def rounded(self, name: str, x: str) -> str:
        """[batch, length, in] as the product of the layer ``name`` sees it."""
        return self.like(self._plan.of(name).rounded(self, self.op("Flatten", x, axis=2)), x, -1)

    def constant(self, name: str, layer: Linear) -> str:
        """The weight [out, in] as the product of the layer ``name`` sees it."""
        return self._plan.of(name).constant(self, name, layer.weight)

    def norm(self, name: str, norm: RMSNorm, x: str) -> str:
        """[..., K] to [..., K]. Twin of :class:`lm.norm.RMSNorm`."""
        square = self.op("ReduceMean", self.op("Mul", x, x), self.ints(-1), keepdims=1)
        rms = self.op("Sqrt", self.op("Add", square, self.number(float(norm.eps or 0.0))))
        return self.op("Mul", self.op("Div", x, rms), self.weight(f"{name}.weight", array(norm.weight)))

    def rows(self, x: str) -> Rows:
        """[batch, length, K] as [batch * length, K]."""
        return Rows(self, self.op("Flatten", x, axis=2))

    def like(self, rows: str, x: str, *inner: int) -> str:
        """[batch * length, ...] to [batch, length, *inner], batch and length those of ``x``."""
        shape = self.op("Concat", self.op("Shape", x, start=0, end=2), self.ints(*inner), axis=0)
        return self.op("Reshape", rows, shape)


def array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """Returns ``tensor`` as fp32 for an initializer."""
    values: npt.NDArray[np.float32] = tensor.detach().float().numpy()
    return values
