"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685): weights stay, small factors beside them are trained.

The product of an adapted layer is ``x W^T + (alpha / rank) x A^T B^T``, A [rank, in] and B [out, rank] (section 4.1).
The factors sit at the seam that :mod:`lm.linear` has for quantization, so no layer is written anew; routed experts have
factors each, stacked as their weights are. :func:`merged` adds them to the weights; :func:`save` writes them as the
``peft`` library reads them, beside the model they started from.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from lm.config import GroupedConfig
from lm.feed_forward import Experts
from lm.hugging_face_files import system_is_told
from lm.layer_names import chosen
from lm.linear import Linear, to_product_type
from lm.model import LanguageModel
from lm.weights import Whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LowRank(nn.Module):
    """The product with a frozen weight, plus that with ``B A`` times ``alpha / rank``; B begins as zero, A does not."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        *stack, outputs, inputs = weight.shape
        # What the layer's own weights were drawn from in torch, and what peft draws: U(-1/sqrt(in), 1/sqrt(in)).
        drawn = torch.rand(*stack, rank, inputs, generator=generator)
        self.lora_A = nn.Parameter((2 * drawn - 1) * inputs**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(*stack, outputs, rank))
        self.rank, self.alpha = rank, alpha

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns [..., out] for ``x`` [..., in] and the layer's own ``weight`` [out, in]."""
        return F.linear(x, weight) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def update(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        """Returns what such factors add to the weight: [out, in], or of all experts [experts, out, in]."""
        return (lora_B @ lora_A) * self.scale


class LowRankStack(LowRank):
    """Factors for each expert, A [experts, rank, in] and B [experts, out, rank]: a :class:`lm.feed_forward.Beside`."""

    def of_expert(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(F.linear(x, self.lora_A[expert]), self.lora_B[expert]) * self.scale

    def of_all(self, x_P: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        down, up = to_product_type(self.lora_A), to_product_type(self.lora_B)
        return F.grouped_mm(F.grouped_mm(x_P, down.mT, offs=ends), up.mT, offs=ends) * self.scale


def adapt(model: LanguageModel, targets: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Freezes ``model`` in place and gives the layers that :func:`chosen` names factors, which ``seed`` draws."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = _layers(model)
    for name in chosen(list(layers), targets):
        module, seam, weight = layers[name]
        kind = LowRankStack if isinstance(module, Experts) else LowRank
        setattr(module, seam, kind(weight, rank, alpha, generator))


def merged(model: LanguageModel, whole: Whole) -> Whole:
    """Returns ``whole`` of the weights of ``model`` with the factors added to those that they stand beside.

    A model of these weights computes the same without factors. ``model`` itself may be on ``meta``.
    """
    adapted = {found.weight: found for found in _adapted(model).values()}

    def one(name: str) -> torch.Tensor:
        value = whole(name)
        if name not in adapted:
            return value
        factors, path = adapted[name].factors, adapted[name].path
        return value + factors.update(whole(f"{path}.lora_A"), whole(f"{path}.lora_B"))

    return one


def save(model: LanguageModel, whole: Whole, folder: Path | None, base: str | None = None) -> None:
    """Writes the factors of ``model``, which ``whole`` returns, into ``folder`` in peft's layout.

    ``base`` is where peft's ``AutoPeftModel`` finds what they belong to; None: whoever loads them knows.
    Equal factors, equal bytes. Without a ``folder`` it asks for the same ones in the same order, and writes nothing.
    """
    adapted = _adapted(model)
    one = next(iter(adapted.values())).factors
    # peft#3711: of a model with experts, it takes any feed-forward layer's name for the experts' stacks. The name
    # of its weight says which one is meant.
    by_weight = [name for name in adapted if ".mlp." in name and not isinstance(model.config, GroupedConfig)]
    config = {
        # Whole names: transformers' model may have layers of the same last name that are not adapted here.
        "target_modules": [name for name in adapted if name not in by_weight],
        "target_parameters": [adapted[name].weight for name in by_weight] or None,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{_peft_name(name, adapted)}.{side}.weight": _peft_factor(whole(f"{path}.{side}"), side)
        for name, (_, _, path) in adapted.items()
        for side in ("lora_A", "lora_B")
    }
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with system_is_told(folder / WEIGHTS):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


class _Adapted(NamedTuple):
    factors: LowRank
    # Their own name in the model's state, and that of the weight that they stand beside.
    weight: str
    path: str


def _adapted(model: LanguageModel) -> dict[str, _Adapted]:
    """Returns the layers of ``model`` that have factors, by the names of :func:`lm.layer_names.adaptable`."""
    found = {}
    for name, (module, seam, _) in _layers(model).items():
        factors = getattr(module, seam)
        if isinstance(factors, LowRank):
            is_stack = isinstance(module, Experts)
            weight, owner = (name, name.rpartition(".")[0]) if is_stack else (f"{name}.weight", name)
            found[name] = _Adapted(factors, weight, f"{owner}.{seam}")
    return found


def _layers(model: LanguageModel) -> dict[str, tuple[nn.Module, str, torch.Tensor]]:
    """Returns by name: what can be adapted, what it calls its factors, and the weight that they stand beside."""
    found: dict[str, tuple[nn.Module, str, torch.Tensor]] = {}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, Linear):
            found[name] = module, "project", module.weight
        elif isinstance(module, Experts):
            found[f"{name}.gate_up_proj"] = module, "beside_in", module.gate_up_proj
            found[f"{name}.down_proj"] = module, "beside_out", module.down_proj
    return found


def _peft_name(name: str, adapted: Mapping[str, _Adapted]) -> str:
    """Returns what peft calls the module of those factors: it wraps one of experts for each stack, the first within."""
    if not isinstance(adapted[name].factors, LowRankStack):
        return name
    experts, _, stack = name.rpartition(".")
    is_within = stack == "gate_up_proj" and f"{experts}.down_proj" in adapted
    return f"{experts}.base_layer" if is_within else experts


def _peft_factor(value: torch.Tensor, side: str) -> torch.Tensor:
    """Returns A [experts * rank, in] or B [out, rank * experts] of a stack: peft has one matrix for all of them."""
    if value.dim() > 2:
        value = value.flatten(0, 1) if side == "lora_A" else value.permute(1, 2, 0).flatten(1)
    return value.contiguous()
