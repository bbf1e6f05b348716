"""What the graph of a model has to multiply by, as its plan says."""

import math
from dataclasses import dataclass, replace

from lm import blockwise
from lm.feed_forward import Experts
from lm.model import LanguageModel
from lm.packing import mixture_scheme, packed_products
from lm.quantization import Plan, layers
from lm.scheme import Scheme, expert_name


@dataclass(frozen=True)
class Product:
    """A weight [outputs, inputs] and the operator that multiplies by it.

    Of an expert with products of its own, ``expert`` is its number and ``part`` what all of its kind are called. What
    expands latents reads them in ``cache``, and is absorbed into the products around it.
    """

    scheme: Scheme
    operator: str
    outputs: int
    inputs: int
    expert: int | None = None
    part: str = ""
    cache: str | None = None


def products(model: LanguageModel, plan: Plan) -> dict[str, Product]:
    """What the graph multiplies by: a layer, layers that are packed into one, and each expert's two parts."""
    found: dict[str, Product] = {}
    caches = {f"model.layers.{index}.self_attn.kv_b_proj": f"past_{index}" for index in range(len(model.model.layers))}
    for name, layer in layers(model).items():
        if isinstance(layer, Experts):
            found |= _of_experts(name, layer, plan)
        else:
            scheme = plan.of(name)
            outputs, inputs = layer.weight.shape
            found[name] = Product(scheme, scheme.operator, outputs, inputs, cache=caches.get(name))
    for name, parts in packed_products(model, plan).items():
        packed = [found.pop(part) for part in parts]
        found[name] = replace(packed[0], outputs=sum(part.outputs for part in packed))
    return found


def _of_experts(name: str, experts: Experts, plan: Plan) -> dict[str, Product]:
    found: dict[str, Product] = {}
    one_node = mixture_scheme(plan, name, experts)
    for part in ("gate_up_proj", "down_proj"):
        count, outputs, inputs = getattr(experts, part).shape
        if one_node is None:
            scheme = plan.of(name, f"{name}.{part}")
            for index in range(count):
                each = Product(scheme, scheme.operator, outputs, inputs, index, f"{name}.{part}")
                found[expert_name(name, index, part)] = each
        else:
            if part == "gate_up_proj":
                # Filled up to whole blocks of what `down_proj` reads.
                outputs = 2 * one_node.size * math.ceil(outputs / 2 / one_node.size)
            found[f"{name}.{part}"] = Product(one_node, blockwise.MIXTURE, count * outputs, inputs)
    return found
