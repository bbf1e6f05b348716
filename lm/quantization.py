"""Which layer of a model is quantized how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache

from lm.blockwise import Blockwise
from lm.config import FloatOrInt8
from lm.feed_forward import Experts, Router
from lm.linear import Embedding, Linear, Project
from lm.model import LanguageModel
from lm.norm import RMSNorm
from lm.per_token import PerToken, fake_quant_rows
from lm.scheme import Float, Scheme
from lm.static import Range, Static

Layer = Linear | Experts | Router

_FLOAT = Float()
# Of routed experts, and of Qwen2's shared one.
_ROUTERS = (".mlp.gate", ".mlp.shared_expert_gate")


@dataclass(frozen=True)
class Plan:
    """The scheme of each layer: of ``head``, of those that a pattern in ``in_float`` matches, and of all ``others``.

    Patterns are those of a shell, over names as in ``model.layers.0.mlp.down_proj``; a layer's routed experts are one
    name, ``model.layers.1.mlp.experts``. The embedding, ``model.embed_tokens``, is INT8, a scale a row, unless a
    pattern matches it. ``routers`` that are INT8 have the scheme of the head, as what decides on much and is small; the
    gates of shared experts are routers too.
    The weights of ``norms`` that are INT8 have one scale each.
    ``ranges`` are those of :class:`lm.static.Static`, by the names of :func:`products`; other schemes need none.
    """

    others: Scheme
    head: Scheme
    in_float: tuple[str, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    routers: FloatOrInt8 = "float"
    norms: FloatOrInt8 = "float"

    def of(self, layer: str, product: str | None = None) -> Scheme:
        """Returns the scheme of the layer ``layer``, or of that one of its products."""
        router = layer.endswith(_ROUTERS)
        if self.matches(layer, self.in_float) or (router and self.routers == "float"):
            return _FLOAT
        within = self.ranges.get(product or layer)
        if within is not None:
            return _static(within)
        return self.head if layer == "lm_head" or router else self.others

    @staticmethod
    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        """Whether one of ``patterns`` means the layer ``name``."""
        return any(fnmatchcase(name, pattern) for pattern in patterns)


@cache
def _static(within: Range) -> Static:
    # One object for equal ranges: layers that read the same values round them once, and are multiplied as one.
    return Static(within)


# So many inputs share a scale in wide blocks.
WIDE = 64
PLANS = {
    "per-token-8": Plan(PerToken(), PerToken()),
    "static-8": Plan(Static(), Static()),
    "blockwise-8": Plan(Blockwise(8, 32), Blockwise(8, 32)),
    # A tenth faster, and as close where no channel stands out: for rotated models.
    "blockwise-8-wide": Plan(Blockwise(8, WIDE), Blockwise(8, WIDE)),
    # The head decides on every token, and is a small share of a model that is worth 4 bits.
    "blockwise-4": Plan(Blockwise(4, 32), Blockwise(8, WIDE)),
}


def layers(model: LanguageModel) -> dict[str, Layer]:
    """Returns the modules that a plan has a scheme for, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def products(name: str, layer: Layer) -> tuple[str, ...]:
    """Returns the names of what is multiplied in the layer ``name``: itself, or the two products of all its experts."""
    return (f"{name}.gate_up_proj", f"{name}.down_proj") if isinstance(layer, Experts) else (name,)


def replace(name: str, layer: Layer, by: Callable[[str, Project], Project]) -> None:
    """Puts ``by(product, project)`` where the layer ``name`` has ``project`` for the product of that name."""
    if isinstance(layer, Experts):
        into, out = products(name, layer)
        layer.project_in, layer.project_out = by(into, layer.project_in), by(out, layer.project_out)
    else:
        layer.project = by(name, layer.project)


def prepare(model: LanguageModel, plan: Plan) -> LanguageModel:
    """Makes each linear layer, expert, router, embedding and norm of ``model`` compute as its graph will."""
    for name, layer in layers(model).items():
        replace(name, layer, lambda product, _: plan.of(name, product).project)  # noqa: B023
    for name, module in model.named_modules():
        if isinstance(module, Embedding):
            module.table = None if plan.matches(name, plan.in_float) else fake_quant_rows
        elif isinstance(module, RMSNorm):
            module.table = fake_quant_rows if plan.norms == "int8" else None
    return model
