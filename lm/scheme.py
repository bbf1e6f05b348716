"""What a quantization scheme is: one product, told twice, for training in floating point and for the graph.

A scheme's ``project`` and ``lower`` lie in one file, and compute the same numbers from the same operands.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from lm.graph import Graph

# The names of an activation's parts in the graph, each with the tokens as its first axis.
Operand = tuple[str, ...]


@dataclass(frozen=True)
class Sorted:
    """What is known of rows in a graph that lie sorted by expert: how many each has, [E], and whose each is, [M]."""

    counts: str
    owners: str


@dataclass(frozen=True)
class Levels:
    """What weights are rounded to: -``most`` ... ``most`` times a scale for ``group`` inputs each, for all if None."""

    most: int
    group: int | None


class Scheme(Protocol):
    """One way to compute ``x @ weight.T``."""

    @property
    def levels(self) -> Levels | None:
        """The levels that a weight is rounded to; None where it stays as it is."""

    @property
    def operator(self) -> str:
        """The graph's operator that multiplies by the weight that :meth:`stored` names."""

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns the product [..., out] of ``x`` [..., in] and ``weight`` [out, in], rounded as the graph rounds."""

    def operand(self, graph: Graph, x: str) -> Operand:
        """Returns what the scheme makes of ``x`` [N, in] before any product."""

    def lower(self, graph: Graph, name: str, weight: torch.Tensor, x: Operand) -> str:
        """Returns the product [N, out] in the graph: the twin of :meth:`project`."""

    def rounded(self, graph: Graph, x: str, width: int) -> str:
        """Returns ``x`` [N, width] as the product sees it, in fp32: for a product that is computed in another order."""

    def constant(self, graph: Graph, name: str, weight: torch.Tensor) -> str:
        """Returns ``weight`` [out, in] as the product sees it, in fp32; onnxruntime computes it when it loads."""

    def stored(self, name: str) -> str:
        """Returns the initializer that holds the weight of the layer ``name``."""


@dataclass(frozen=True)
class Float:
    """No quantization."""

    operator: str = "MatMul"
    levels: Levels | None = None

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    def operand(self, graph: Graph, x: str) -> Operand:
        return (x,)

    def lower(self, graph: Graph, name: str, weight: torch.Tensor, x: Operand) -> str:
        columns = weight.detach().float().numpy().T
        return graph.op("MatMul", *x, graph.weight(self.stored(name), np.ascontiguousarray(columns)))

    def rounded(self, graph: Graph, x: str, width: int) -> str:
        return x

    def constant(self, graph: Graph, name: str, weight: torch.Tensor) -> str:
        return graph.weight(self.stored(name), weight.detach().float().numpy())

    def stored(self, name: str) -> str:
        return f"{name}.weight"


def expert_name(name: str, index: int, part: str) -> str:
    """Returns what the product of the ``part`` of one expert of the layer ``name`` is called."""
    return f"{name}.{index}.{part}"


class Rows:
    """Activations [N, K] in a graph; what a scheme makes of them is made once, for all layers that read them."""

    def __init__(self, graph: Graph, value: str) -> None:
        self._graph, self._value = graph, value
        self._made: dict[Scheme, Operand] = {}

    def operand(self, scheme: Scheme) -> Operand:
        if scheme not in self._made:
            self._made[scheme] = scheme.operand(self._graph, self._value)
        return self._made[scheme]

    def take(self, chosen: str) -> "Rows":
        """Returns the rows with the numbers ``chosen`` [M]; their quantized parts are taken, not made anew."""
        return _Taken(self._graph, self, chosen)


class _Taken(Rows):
    def __init__(self, graph: Graph, rows: Rows, chosen: str) -> None:
        super().__init__(graph, "")
        self._rows, self._chosen = rows, chosen

    def operand(self, scheme: Scheme) -> Operand:
        if scheme not in self._made:
            parts = self._rows.operand(scheme)
            self._made[scheme] = tuple(self._graph.op("Gather", part, self._chosen) for part in parts)
        return self._made[scheme]
