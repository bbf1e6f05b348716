"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685): weights stay, small factors beside them are trained.

The product of an adapted layer is ``x W^T + (alpha / rank) x A^T B^T``, A [rank, in] and B [out, rank] (section 4.1).
The factors sit at the seam that :mod:`lm.linear` has for quantization, so no layer is written anew. :func:`merge` adds
them to the weights; :func:`save` writes them as the ``peft`` library reads them, beside the model they started from.
"""

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from lm.config import LatentConfig, ModelConfig
from lm.linear import Linear
from lm.model import LanguageModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LowRank(nn.Module):
    """The product with a frozen weight, plus that with ``B A`` times ``alpha / rank``; B begins as zero, A does not."""

    def __init__(self, layer: Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        # What the layer's own weights were drawn from in torch, and what peft draws: U(-1/sqrt(in), 1/sqrt(in)).
        bound = layer.in_features**-0.5
        drawn = torch.rand(rank, layer.in_features, generator=generator)
        self.lora_A = nn.Parameter((2 * drawn - 1) * bound)
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.rank, self.alpha = rank, alpha

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns [..., out] for ``x`` [..., in] and the layer's own ``weight`` [out, in]."""
        return F.linear(x, weight) + F.linear(F.linear(x, self.lora_A), self.lora_B) * (self.alpha / self.rank)

    @torch.no_grad()
    def update(self) -> torch.Tensor:
        """Returns what the factors add to the weight: [out, in]."""
        return (self.lora_B @ self.lora_A) * (self.alpha / self.rank)


def adaptable(config: ModelConfig) -> list[str]:
    """Returns the names of the layers of such a model that can be adapted: all linear ones between embedding and head.

    Routers are no linear layers, and routed experts lie in stacks.
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
        layers[name].project = LowRank(layers[name], rank, alpha, generator)


def merge(model: LanguageModel) -> None:
    """Adds the factors to the weights that they stand beside, in place: the model computes the same without them."""
    for layer in _layers(model).values():
        if isinstance(layer.project, LowRank):
            with torch.no_grad():
                layer.weight += layer.project.update()
            del layer.project
            layer.project = F.linear
    model.requires_grad_(True)


def save(model: LanguageModel, folder: Path) -> None:
    """Writes the factors of ``model``, not yet merged, into ``folder`` in peft's layout; equal factors, equal bytes."""
    adapted = {name: layer.project for name, layer in _layers(model).items() if isinstance(layer.project, LowRank)}
    one = next(iter(adapted.values()))
    tensors = {
        f"base_model.model.{name}.{factor}.weight": getattr(adapter, factor).detach().cpu().contiguous()
        for name, adapter in adapted.items()
        for factor in ("lora_A", "lora_B")
    }
    # peft#3711: of a model with experts, it takes any feed-forward layer's name for the experts' stacks. The name
    # of its weight says which one is meant.
    by_weight = [name for name in adapted if ".mlp." in name and isinstance(model.config, LatentConfig)]
    config = {
        # Whole names: transformers' model may have layers of the same last name that are not adapted here.
        "target_modules": [name for name in adapted if name not in by_weight],
        "target_parameters": [f"{name}.weight" for name in by_weight] or None,
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
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _layers(model: LanguageModel) -> dict[str, Linear]:
    blocks = model.model.layers.named_modules(prefix="model.layers")
    return {name: module for name, module in blocks if isinstance(module, Linear)}


def _parts(name: str) -> tuple[str, str]:
    return name, name.rpartition(".")[2]
