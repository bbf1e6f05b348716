import json
from pathlib import Path

import pytest
import torch
from odd import make_model

from lm.model import LanguageModel

VARIANTS = {
    "plain": {},
    "query latent and groups": {"q_lora_rank": 24, "n_group": 4, "topk_group": 2},
    "dense only": {"first_k_dense_replace": 3},
    "experts only, weights not normalized": {"first_k_dense_replace": 0, "norm_topk_prob": False},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make_model(**request.param)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """As much of a tokenizer.json as the layout needs: its special token."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"added_tokens": [{"id": 100, "content": "<|endoftext|>"}]}))
    return path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 100, (2, 33), generator=torch.Generator().manual_seed(5))
