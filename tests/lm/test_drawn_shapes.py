"""Parity with transformers on shapes that nobody chose: sizes, groups, stretching and ties are drawn."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from odd import make_grouped, make_grouped_mixture, make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm import hugging_face
from lm.model import LanguageModel

# Set another seed to try other shapes.
SEED = int(os.environ.get("SHAPES_SEED", "0"))
LENGTH = 24


def common(draw: random.Random) -> dict[str, Any]:
    """What all families have."""
    return {
        "hidden_size": draw.randrange(8, 60),
        "num_hidden_layers": draw.randrange(1, 4),
        "intermediate_size": draw.randrange(5, 90),
        "rope_theta": draw.choice([500.0, 10000.0, 1e6]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.5,
        "initializer_range": 0.2,
    }


def stretched(draw: random.Random, kind: str) -> dict[str, Any]:
    low, high = {"yarn": ("beta_slow", "beta_fast"), "llama3": ("low_freq_factor", "high_freq_factor")}[kind]
    start = draw.uniform(0.2, 2.0)
    return {
        "rope_type": kind, "factor": draw.uniform(1.5, 32.0), low: start, high: start + draw.uniform(0.5, 30.0),
        "original_max_position_embeddings": draw.randrange(4, 64),
    }  # fmt: skip


def latent(draw: random.Random) -> LanguageModel:
    second = draw.random() < 0.4
    groups, each = draw.randrange(1, 5), draw.randrange(2, 5)
    open_groups = draw.randrange(1, groups + 1)
    scaled = {**stretched(draw, "yarn"), "mscale": draw.uniform(0.3, 1.5), "mscale_all_dim": draw.uniform(0.3, 1.5)}
    shape, heads = common(draw), draw.randrange(1, 6)
    if second:
        # As transformers wants it of its Llama, of which its V2 is one.
        shape["hidden_size"] = heads * draw.randrange(3, 12)
    return make_model(
        **shape,
        model_type="deepseek_v2" if second else "deepseek_v3",
        num_attention_heads=heads,
        q_lora_rank=draw.choice([None, draw.randrange(4, 30)]),
        # transformers' V2 views pairs as complex numbers, also behind what is not turned.
        kv_lora_rank=2 * draw.randrange(2, 15),
        qk_nope_head_dim=2 * draw.randrange(1, 10),
        qk_rope_head_dim=2 * draw.randrange(1, 7),
        v_head_dim=draw.randrange(2, 20),
        rope_scaling=draw.choice([None, scaled]),
        first_k_dense_replace=draw.randrange(0, shape["num_hidden_layers"] + 1),
        moe_intermediate_size=draw.randrange(3, 40),
        n_routed_experts=groups * each,
        n_shared_experts=draw.randrange(1, 4),
        num_experts_per_tok=draw.randrange(1, open_groups * each + 1),
        n_group=groups,
        topk_group=open_groups,
        norm_topk_prob=not second and draw.random() < 0.7,
        routed_scaling_factor=draw.uniform(0.5, 3.0),
    )


def grouped_heads(draw: random.Random) -> dict[str, Any]:
    groups = draw.randrange(1, 4)
    count = groups * draw.randrange(1, 4)
    return {
        # transformers' Llama wants a multiple of the heads, though nothing depends on that.
        "hidden_size": count * draw.randrange(2, 9), "num_attention_heads": count, "num_key_value_heads": groups,
        "head_dim": 2 * draw.randrange(1, 24),
    }  # fmt: skip


def grouped(draw: random.Random) -> LanguageModel:
    family = draw.choice(["llama", "qwen2", "qwen3"])
    scaling = draw.choice([None, stretched(draw, "llama3" if family == "llama" else "yarn")])
    return make_grouped(**{**common(draw), **grouped_heads(draw)}, model_type=family, rope_scaling=scaling)


def grouped_mixture(draw: random.Random, **more: Any) -> LanguageModel:
    shape = {**common(draw), **grouped_heads(draw)}
    del shape["intermediate_size"]
    experts = draw.randrange(2, 12)
    return make_grouped_mixture(
        **shape,
        **more,
        rope_scaling=draw.choice([None, stretched(draw, "yarn")]),
        moe_intermediate_size=draw.randrange(3, 40),
        num_experts=experts,
        num_experts_per_tok=draw.randrange(1, experts + 1),
        norm_topk_prob=draw.random() < 0.5,
    )


def gated_mixture(draw: random.Random) -> LanguageModel:
    return grouped_mixture(draw, model_type="qwen2_moe", shared_expert_intermediate_size=draw.randrange(3, 60))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("make", [latent, grouped, grouped_mixture, gated_mixture])
def test_a_drawn_shape_computes_learns_and_comes_back_as_in_transformers(
    make: Callable[[random.Random], LanguageModel], number: int, tokenizer_file: Path, tmp_path: Path
) -> None:
    model = make(random.Random(f"{SEED} {number}"))
    print(model.config)
    ids = torch.randint(0, 100, (2, LENGTH), generator=torch.Generator().manual_seed(number))
    for name in ("ours", "theirs", "again"):
        (tmp_path / name).mkdir()
    hugging_face.save(model, tokenizer_file, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation="eager").eval()
    logits, expected = model(ids), theirs(ids).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    model.loss(ids).backward()
    theirs(ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:].contiguous()).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=f"{name} differs")
    theirs.save_pretrained(tmp_path / "theirs")
    hugging_face.save(hugging_face.load(tmp_path / "theirs"), tokenizer_file, tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(tensor.numpy().tobytes() == after[name].numpy().tobytes() for name, tensor in before.items())
