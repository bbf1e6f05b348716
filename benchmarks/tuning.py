"""Fine-tuning as the stage ``quantize`` does it, on the model of ``accuracy.py``, for that and ``four_bits.py``."""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lm.distillation import teach  # noqa: E402
from lm.model import LanguageModel  # noqa: E402
from tasks.optimizers import make_optimizer  # noqa: E402
from tasks.quantize.params import QuantizeParams  # noqa: E402
from tasks.schedule import learning_rate_at  # noqa: E402
from tasks.section import read_section  # noqa: E402

# Tokens a window, steps, and windows a step.
LENGTH, STEPS, BATCH, RATE = 256, 30, 4, 5e-5
Objective = Literal["text", "float"]


def params_of(steps: int = STEPS, batch: int = BATCH, learning_rate: float = RATE) -> QuantizeParams:
    """Returns the default parameters, but for these."""
    section = read_section("quantize", QuantizeParams, ROOT / "params.yaml")
    return section.model_copy(update={"steps": steps, "learning_rate": learning_rate, "global_batch": batch})


def fine_tune(
    model: LanguageModel, teacher: LanguageModel, objective: Objective, pages: torch.Tensor, params: QuantizeParams
) -> None:
    """Takes ``params.steps`` steps on ``model``, prepared for its plan; ``pages`` [windows, T + 1] are seen once."""
    optimizer = make_optimizer(model, params)
    if objective == "float":
        teach(model, teacher)
    order = np.random.default_rng(params.seed).permutation(len(pages)).reshape(params.steps, params.global_batch)
    model.train()
    for step, chosen in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, params, group["initial_lr"])
        windows = pages[chosen]
        loss = model.loss(windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), params.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        print(f"  {objective} {step + 1}: {float(loss):.4f}", file=sys.stderr, flush=True)
