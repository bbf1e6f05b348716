"""A shape says what the layers of its model are called."""

from typing import Any

import pytest
from odd import make_gated_mixture, make_grouped, make_grouped_mixture, make_model

from lm.layer_names import layer_names
from lm.quantization import layers


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (make_model, {}),
        (make_model, {"q_lora_rank": 16, "first_k_dense_replace": 0}),
        (make_model, {"first_k_dense_replace": 3}),
        (make_grouped, {}),
        (make_grouped, {"model_type": "qwen2", "tie_word_embeddings": True}),
        (make_grouped, {"model_type": "qwen3"}),
        (make_grouped_mixture, {}),
        (make_gated_mixture, {}),
    ],
)
def test_they_are_those_that_the_model_has(make: Any, changes: dict[str, Any]) -> None:
    model = make(**changes)
    found = [*layer_names(model.config)]
    assert len(found) == len(set(found))
    assert set(found) == {"model.embed_tokens", *layers(model)}
