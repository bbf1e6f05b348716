"""What a model's layers are called, by its shape alone: for whoever has no model yet, or no torch."""

from collections.abc import Iterator

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


def _attention(shape: Architecture) -> tuple[str, ...]:
    if not isinstance(shape, LatentArchitecture):
        return "q_proj", "k_proj", "v_proj", "o_proj"
    queries = ("q_proj",) if shape.q_lora_rank is None else ("q_a_proj", "q_b_proj")
    return *queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"


def _feed_forward(shape: Architecture, index: int) -> tuple[str, ...]:
    if isinstance(shape, LatentArchitecture) and index >= shape.first_k_dense_replace:
        return "gate", "experts", *(f"shared_experts.{name}" for name in _DENSE)
    return ("gate", "experts") if isinstance(shape, GroupedMixtureArchitecture) else _DENSE
