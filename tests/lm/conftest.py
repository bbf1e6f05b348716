import json
from pathlib import Path

import pytest
import torch
from odd import make_grouped, make_model

from lm.model import LanguageModel

VARIANTS = {
    "plain": {},
    "query latent and groups": {"q_lora_rank": 24, "n_group": 4, "topk_group": 2},
    "dense only": {"first_k_dense_replace": 3},
    "experts only, weights not normalized": {"first_k_dense_replace": 0, "norm_topk_prob": False},
}
LLAMA_3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32
}  # fmt: skip
GROUPED_VARIANTS = {
    "llama": {},
    "llama, stretched and tied": {"rope_scaling": LLAMA_3, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3, one head of keys": {"model_type": "qwen3", "num_key_value_heads": 1},
}
MODELS = {
    **{name: (make_model, changes) for name, changes in VARIANTS.items()},
    **{name: (make_grouped, changes) for name, changes in GROUPED_VARIANTS.items()},
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest) -> LanguageModel:
    make, changes = request.param
    return make(**changes)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """As much of a tokenizer.json as the layout needs: its special token."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"added_tokens": [{"id": 100, "content": "<|endoftext|>"}]}))
    return path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 100, (2, 33), generator=torch.Generator().manual_seed(5))
