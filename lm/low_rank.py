"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685): weights stay, small factors beside them are trained.

The product of an adapted layer is ``x W^T + (alpha / rank) x A^T B^T``, A [rank, in] and B [out, rank] (section 4.1).
The factors sit at the seam that :mod:`lm.linear` has for quantization, so no layer is written anew; routed experts have
factors each, stacked as their weights are. :func:`merge` adds them to the weights; :func:`save` writes them as the
``peft`` library reads them, beside the model they started from.
"""

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from lm.config import GroupedConfig, ModelConfig
from lm.feed_forward import Experts
from lm.linear import Linear, to_product_type
from lm.model import LanguageModel

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

    @torch.no_grad()
    def update(self) -> torch.Tensor:
        """Returns what the factors add to the weight: [out, in], or of all experts [experts, out, in]."""
        return (self.lora_B @ self.lora_A) * self.scale


class LowRankStack(LowRank):
    """Factors for each expert, A [experts, rank, in] and B [experts, out, rank]: a :class:`lm.feed_forward.Beside`."""

    def of_expert(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return F.linear(F.linear(x, self.lora_A[expert]), self.lora_B[expert]) * self.scale

    def of_all(self, x_P: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        down, up = to_product_type(self.lora_A), to_product_type(self.lora_B)
        return F.grouped_mm(F.grouped_mm(x_P, down.mT, offs=ends), up.mT, offs=ends) * self.scale


def adaptable(config: ModelConfig) -> list[str]:
    """Returns the names of the layers of such a model that can be adapted: all linear ones between embedding and head.

    Of a layer's routed experts, both stacks. Routers are no linear layers.
    """
    with torch.device("meta"):
        return list(_layers(LanguageModel(config)))


def chosen(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Returns those of ``names`` that a pattern of ``targets`` matches, as a whole or in the part after the last dot.

    Raises :class:`ValueError` that names a pattern which matches none.
    """
    found = {
        target: [name for name in names if any(fnmatch.fnmatchcase(part, target) for part in _parts(name))]
        for target in targets
    }
    if idle := [target for target, matched in found.items() if not matched]:
        known = ", ".join(sorted({_parts(name)[1] for name in names}))
        raise ValueError(f"no layer is named {', '.join(idle)}; those that can be adapted are {known}")
    return [name for name in names if any(name in matched for matched in found.values())]


def adapt(model: LanguageModel, targets: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Freezes ``model`` in place and gives the layers that :func:`chosen` names factors, which ``seed`` draws."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = _layers(model)
    for name in chosen(list(layers), targets):
        module, seam, weight = layers[name]
        kind = LowRankStack if isinstance(module, Experts) else LowRank
        setattr(module, seam, kind(weight, rank, alpha, generator))


def merge(model: LanguageModel) -> None:
    """Adds the factors to the weights that they stand beside, in place: the model computes the same without them."""
    for module, seam, weight in _layers(model).values():
        factors = getattr(module, seam)
        if isinstance(factors, LowRank):
            with torch.no_grad():
                weight.add_(factors.update())
            delattr(module, seam)
            setattr(module, seam, None if isinstance(module, Experts) else F.linear)
    model.requires_grad_(True)


def save(model: LanguageModel, folder: Path) -> None:
    """Writes the factors of ``model``, not yet merged, into ``folder`` in peft's layout; equal factors, equal bytes."""
    adapted = {
        name: factors
        for name, (module, seam, _) in _layers(model).items()
        if isinstance(factors := getattr(module, seam), LowRank)
    }
    one = next(iter(adapted.values()))
    # peft#3711: of a model with experts, it takes any feed-forward layer's name for the experts' stacks. The name
    # of its weight says which one is meant.
    by_weight = [name for name in adapted if ".mlp." in name and not isinstance(model.config, GroupedConfig)]
    config = {
        # Whole names: transformers' model may have layers of the same last name that are not adapted here.
        "target_modules": [name for name in adapted if name not in by_weight],
        "target_parameters": [name if _is_stack(adapted[name]) else f"{name}.weight" for name in by_weight] or None,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{_peft_name(name, adapted)}.{side}.weight": value.detach().cpu().contiguous()
        for name, factors in adapted.items()
        for side, value in _peft_factors(factors)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


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


def _is_stack(factors: LowRank) -> bool:
    return isinstance(factors, LowRankStack)


def _peft_name(name: str, adapted: Mapping[str, LowRank]) -> str:
    """Returns what peft calls the module of those factors: it wraps one of experts for each stack, the first within."""
    if not _is_stack(adapted[name]):
        return name
    experts, _, stack = name.rpartition(".")
    is_within = stack == "gate_up_proj" and f"{experts}.down_proj" in adapted
    return f"{experts}.base_layer" if is_within else experts


def _peft_factors(factors: LowRank) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields A [experts * rank, in] and B [out, rank * experts] of a stack: peft has one matrix for all of them."""
    down, up = factors.lora_A, factors.lora_B
    stacked = _is_stack(factors)
    yield "lora_A", down.flatten(0, 1) if stacked else down
    yield "lora_B", up.permute(1, 2, 0).flatten(1) if stacked else up


def _parts(name: str) -> tuple[str, str]:
    return name, name.rpartition(".")[2]
