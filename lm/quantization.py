"""Which layer of a model is quantized how."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from lm.blockwise import Blockwise
from lm.feed_forward import Experts
from lm.linear import Embedding, Linear
from lm.model import LanguageModel
from lm.per_token import PerToken, fake_quant_rows
from lm.scheme import Float, Scheme

_FLOAT = Float()


@dataclass(frozen=True)
class Plan:
    """The scheme of each layer: of ``head``, of those that a pattern in ``in_float`` matches, and of all ``others``.

    Patterns are those of a shell, over names as in ``model.layers.0.mlp.down_proj``; a layer's routed experts are one
    name, ``model.layers.1.mlp.experts``. Routers are float in any case; embeddings are INT8, a scale a row.
    """

    others: Scheme
    head: Scheme
    in_float: tuple[str, ...] = ()

    def of(self, name: str) -> Scheme:
        """Returns the scheme of the layer ``name``."""
        if self.matches(name, self.in_float):
            return _FLOAT
        return self.head if name == "lm_head" else self.others

    @staticmethod
    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        """Whether one of ``patterns`` means the layer ``name``."""
        return any(fnmatchcase(name, pattern) for pattern in patterns)


PLANS = {
    "per-token-8": Plan(PerToken(), PerToken()),
    "blockwise-8": Plan(Blockwise(8), Blockwise(8)),
    # The head decides on every token, and is a small share of a model that is worth 4 bits.
    "blockwise-4": Plan(Blockwise(4), Blockwise(8)),
}


def layers(model: LanguageModel) -> dict[str, Linear | Experts]:
    """Returns the modules that a plan has a scheme for, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear | Experts)}


def prepare(model: LanguageModel, plan: Plan) -> LanguageModel:
    """Makes each linear layer, expert and embedding of ``model`` compute as its graph will; the routers stay float."""
    for name, layer in layers(model).items():
        layer.project = plan.of(name).project
    for module in model.modules():
        if isinstance(module, Embedding):
            module.table = fake_quant_rows
    return model
