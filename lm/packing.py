"""What is one node in the graph: layers that read the same values, and experts. A token wakes the threads once for all.

Each output channel is computed as it would be in a product of its own, so packing changes no number.
"""

from collections.abc import Iterable

from torch import nn

from lm.blockwise import Blockwise
from lm.feed_forward import Experts, SwiGLU
from lm.grouped import GroupedAttention
from lm.latent import LatentAttention
from lm.linear import Linear
from lm.quantization import Plan, products


def siblings(module: nn.Module) -> dict[str, Linear]:
    """Returns the layers of ``module`` that read the same values, by name; none where there are no two."""
    names: tuple[str, ...] = ()
    if isinstance(module, GroupedAttention):
        names = ("q_proj", "k_proj", "v_proj")
    elif isinstance(module, LatentAttention):
        names = ("q_proj" if module.config.q_lora_rank is None else "q_a_proj", "kv_a_proj_with_mqa")
    elif isinstance(module, SwiGLU):
        names = ("gate_proj", "up_proj")
    return {name: getattr(module, name) for name in names}


def packable(plan: Plan, prefix: str, names: Iterable[str]) -> bool:
    """Whether ``plan`` has one scheme for the layers ``prefix.NAME``."""
    return len({plan.of(f"{prefix}.{name}") for name in names}) == 1


def packed_name(prefix: str, names: Iterable[str]) -> str:
    """Returns what the product of the layers ``prefix.NAME`` is called: ``prefix.q_proj+k_proj+v_proj``."""
    return f"{prefix}.{'+'.join(names)}"


def packed_products(model: nn.Module, plan: Plan) -> dict[str, list[str]]:
    """Returns the packed products of the graph of ``model``, and the layers that each is made of."""
    found: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        layers = siblings(module)
        if layers and packable(plan, prefix, layers):
            found[packed_name(prefix, layers)] = [f"{prefix}.{name}" for name in layers]
    return found


def mixture_scheme(plan: Plan, name: str, experts: Experts) -> Blockwise | None:
    """Returns the scheme in which all experts of the layer ``name`` are one node, or None where they are not."""
    schemes = {plan.of(name, product) for product in products(name, experts)}
    scheme = schemes.pop()
    if schemes or not isinstance(scheme, Blockwise) or experts.turn is not None:
        return None
    return None if experts.down_proj.shape[1] % scheme.size else scheme
