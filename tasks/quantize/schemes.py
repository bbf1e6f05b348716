"""The schemes of ``quantize.scheme``, and what each costs on the validation split."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from lm.model import LanguageModel
from lm.quantization import PLANS, Plan, layers
from tasks.bootstrap import Bootstrap, Estimate, Values
from tasks.errors import BadParameter
from tasks.quantize.params import QuantizeParams, SchemeName
from tasks.shards import WindowReader
from tasks.world import World

_RESAMPLES = 1000


@dataclass(frozen=True)
class Scheme:
    """``plan`` names one of :data:`lm.quantization.PLANS`."""

    plan: str
    fine_tuned: bool


SCHEMES: dict[SchemeName, Scheme] = {
    "dynamic": Scheme("per-token-8", fine_tuned=False),
    "weight-only-8": Scheme("blockwise-8", fine_tuned=False),
    "qat": Scheme("per-token-8", fine_tuned=True),
    "weight-only-4": Scheme("blockwise-4", fine_tuned=True),
}


class Trial(BaseModel):
    """What one scheme loses of float's loss on the validation split, paired by window, before or after fine-tuning."""

    model_config = ConfigDict(frozen=True)

    scheme: SchemeName
    after: Literal["post-training", "fine-tuning"]
    relative_loss: Estimate


class Quantization(BaseModel):
    """``models/int8/quantization.json``: the scheme of the model, and all that was tried on the way to it.

    ``improved``: the model is more than the float one rounded as ``plan`` says.
    """

    model_config = ConfigDict(frozen=True)

    asked: str
    scheme: SchemeName
    plan: str
    improved: bool
    in_float: tuple[str, ...]
    windows: int
    trials: tuple[Trial, ...]


def plan_of(name: SchemeName, params: QuantizeParams) -> Plan:
    """Returns the scheme of each layer."""
    return dataclasses.replace(PLANS[SCHEMES[name].plan], in_float=params.in_float)


def check_in_float(model: LanguageModel, params: QuantizeParams) -> None:
    """Raises :class:`BadParameter` for a pattern that no layer matches, or when every layer stays float."""
    names = list(layers(model))
    kept: set[str] = set()
    for pattern in params.in_float:
        matched = {name for name in names if Plan.matches(name, (pattern,))}
        if not matched:
            examples = ", ".join(names[1:4])
            raise BadParameter(
                f"params.yaml: quantize.in_float: no layer's name matches '{pattern}'. Names are {examples} and so on, "
                "and * stands for anything."
            )
        kept |= matched
    if kept == set(names):
        raise BadParameter("params.yaml: quantize.in_float leaves no layer to quantize. Take a pattern out.")


class Measure:
    """Losses on validation windows spread evenly over the split, those of the float model once."""

    def __init__(self, model: LanguageModel, windows: WindowReader, params: QuantizeParams, world: World) -> None:
        self._windows, self._params, self._world = windows, params, world
        available = len(windows)
        self.count = min(params.validation_windows, available)
        self._chosen = np.arange(self.count) * available // self.count
        self._float = self._losses(model)

    def relative_loss(self, model: LanguageModel) -> Estimate:
        """Returns the loss of ``model`` over the float model's, minus 1, with its 95% interval over windows."""
        bootstrap = Bootstrap(self.count, _RESAMPLES, self._params.seed)
        return bootstrap.ratio(self._losses(model) - self._float, self._float)

    @torch.no_grad()
    def _losses(self, model: LanguageModel) -> Values:
        # Each process computes its share; the others' places are zero until all are summed.
        world = self._world
        losses = torch.zeros(self.count, dtype=torch.float64, device=world.device)
        model.to(world.device).eval()
        for place in range(world.rank, self.count, world.size):
            window = torch.from_numpy(self._windows.batch(self._chosen[place : place + 1])).to(world.device).long()
            losses[place] = model.loss(window).double()
        model.train()
        summed: Values = world.sum(losses).cpu().numpy()
        return summed
