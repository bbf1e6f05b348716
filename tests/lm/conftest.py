import itertools
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest
import torch
from graphs import CALIBRATION, opened
from odd import make_gated_mixture, make_grouped, make_grouped_mixture, make_model
from tokenizers import Tokenizer
from tokenizers.models import BPE

from lm import onnx_model
from lm.calibration import calibrate
from lm.model import LanguageModel
from lm.quantization import PLANS, Plan

# Whose experts blocks of 32 divide: those are one node in a graph.
WHOLE_BLOCKS = {"hidden_size": 64}
VARIANTS = {
    "plain": {},
    "query latent and groups": {**WHOLE_BLOCKS, "q_lora_rank": 24, "n_group": 4, "topk_group": 2},
    "dense only": {"first_k_dense_replace": 3},
    "experts only, weights not normalized": {**WHOLE_BLOCKS, "first_k_dense_replace": 0, "norm_topk_prob": False},
}
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# As DeepSeek-V3 has it, and as Qwen has it, for 16 positions at first.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK_YARN = {**YARN, "beta_fast": 2.0, "beta_slow": 0.25, "mscale": 0.7, "mscale_all_dim": 1.3}
GREEDY = {"model_type": "deepseek_v2", "norm_topk_prob": False}
VARIANTS |= {
    "stretched and tied, other norms": {
        "rope_scaling": DEEPSEEK_YARN, "tie_word_embeddings": True, "n_group": 2, "rms_norm_eps": 1e-3,
    },
    "v2": GREEDY,
    "v2, groups, query latent, stretched": {
        **GREEDY, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "rope_scaling": DEEPSEEK_YARN,
    },
    "v2, groups of one": {
        **GREEDY, **WHOLE_BLOCKS, "num_attention_heads": 2, "n_group": 8, "topk_group": 5, "tie_word_embeddings": True,
    },
}  # fmt: skip
GROUPED_VARIANTS = {
    "llama": {},
    # As DeepSeek-Coder.
    "llama, stretched evenly": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama, stretched for longer texts alone": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    "llama, stretched and tied": {"rope_scaling": LLAMA_3, "tie_word_embeddings": True},
    # As Granite's code models.
    "llama, biases, narrow heads": {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 10,
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, stretched": {"model_type": "qwen2", "rope_scaling": {**YARN, "beta_fast": 4.0}},
    "qwen3, one head of keys": {"model_type": "qwen3", "num_key_value_heads": 1},
    "qwen3, biases, wide heads": {"model_type": "qwen3", "attention_bias": True, "head_dim": 36},
    "qwen3, stretched and tied": {"model_type": "qwen3", "rope_scaling": YARN, "tie_word_embeddings": True},
}  # fmt: skip
GROUPED_MIXTURES = {
    "qwen3_moe": {},
    # Whose experts are one node in a graph.
    "qwen3_moe, whole blocks, stretched and tied, weights not normalized": {
        **WHOLE_BLOCKS, "norm_topk_prob": False, "rope_scaling": YARN, "tie_word_embeddings": True,
    },
}  # fmt: skip
GATED_MIXTURES = {
    "qwen2_moe": {},
    # Queries and keys that are not normed make sharp scores of wide weights, in which fp32 keeps fewer digits.
    "qwen2_moe, whole blocks, stretched and tied, weights normalized": {
        **WHOLE_BLOCKS, "norm_topk_prob": True, "rope_scaling": YARN, "tie_word_embeddings": True,
        "initializer_range": 0.1,
    },
}  # fmt: skip
MODELS = {
    **{name: (make_model, changes) for name, changes in VARIANTS.items()},
    **{name: (make_grouped, changes) for name, changes in GROUPED_VARIANTS.items()},
    **{name: (make_grouped_mixture, changes) for name, changes in GROUPED_MIXTURES.items()},
    **{name: (make_gated_mixture, changes) for name, changes in GATED_MIXTURES.items()},
}


def made(name: str) -> LanguageModel:
    make, changes = MODELS[name]
    return make(**changes)


@pytest.fixture(params=MODELS.keys())
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return made(request.param)


@dataclass(frozen=True)
class Exported:
    """A model, the plan by which it was calibrated and exported, and its graph: the file, and ready to run."""

    model: LanguageModel
    plan: Plan
    path: Path
    session: onnxruntime.InferenceSession


@pytest.fixture(scope="module", params=itertools.product(MODELS, PLANS), ids=lambda names: "-".join(names))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Is there for several tests in turn, which leave the model as it is."""
    model, plan = made(request.param[0]), PLANS[request.param[1]]
    plan = calibrate(model, plan, CALIBRATION)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    onnx_model.export(model, plan, path)
    return Exported(model, plan, path, opened(path))


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer.json with as many tokens as the models have, the last one special."""
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(BPE({str(number): number for number in range(100)}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 100, (2, 33), generator=torch.Generator().manual_seed(5))
