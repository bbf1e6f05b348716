"""What a model's layers are called, by its shape alone: for whoever has no model yet, or no torch."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from lm.config import Architecture, GroupedMixtureArchitecture, LatentArchitecture

_DENSE = ("gate_proj", "up_proj", "down_proj")


def layer_names(shape: Architecture) -> Iterator[str]:
    """Yields the embedding's name and those of all that :func:`lm.quantization.layers` finds in such a model."""
    yield "model.embed_tokens"
    attention = [f"self_attn.{name}" for name in _attention(shape)]
    for index in range(shape.num_hidden_layers):
        for name in (*attention, *(f"mlp.{name}" for name in _feed_forward(shape, index))):
            yield f"model.layers.{index}.{name}"
    yield "lm_head"


def adaptable(shape: Architecture) -> list[str]:
    """Returns the names of the layers of such a model that low-rank factors can adapt: between embedding and head.

    Of a layer's routed experts, both stacks. Routers are no linear layers.
    """
    found = []
    for name in layer_names(shape):
        if name.endswith(".mlp.experts"):
            found += [f"{name}.gate_up_proj", f"{name}.down_proj"]
        elif name not in ("model.embed_tokens", "lm_head") and not name.endswith(".mlp.gate"):
            found.append(name)
    return found


def is_stack(name: str) -> bool:
    """Whether a name of :func:`adaptable` is that of a stack of routed experts' weights."""
    return ".mlp.experts." in name


def chosen(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Returns those of ``names`` that a pattern of ``targets`` matches, as a whole or in the part after the last dot.

    Raises :class:`ValueError` that names a pattern which matches none.
    """
    found = {
        target: [name for name in names if fnmatchcase(name, target) or fnmatchcase(last_part(name), target)]
        for target in targets
    }
    if idle := [target for target, matched in found.items() if not matched]:
        known = ", ".join(sorted(set(map(last_part, names))))
        raise ValueError(f"no layer is named {', '.join(idle)}; those that can be adapted are {known}")
    return [name for name in names if any(name in matched for matched in found.values())]


def last_part(name: str) -> str:
    """Returns ``q_proj`` of ``model.layers.0.self_attn.q_proj``."""
    return name.rpartition(".")[2]


def _attention(shape: Architecture) -> tuple[str, ...]:
    if not isinstance(shape, LatentArchitecture):
        return "q_proj", "k_proj", "v_proj", "o_proj"
    queries = ("q_proj",) if shape.q_lora_rank is None else ("q_a_proj", "q_b_proj")
    return *queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"


def _feed_forward(shape: Architecture, index: int) -> tuple[str, ...]:
    if isinstance(shape, LatentArchitecture) and index >= shape.first_k_dense_replace:
        return "gate", "experts", *(f"shared_experts.{name}" for name in _DENSE)
    if isinstance(shape, GroupedMixtureArchitecture):
        shared = ("shared_expert_gate", *(f"shared_expert.{name}" for name in _DENSE)) if shape.shared_size else ()
        return "gate", "experts", *shared
    return _DENSE
