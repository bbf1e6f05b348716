"""The schemes of ``quantize.scheme``, and what each costs on the validation split."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict

from lm.config import FloatOrInt8, ModelConfig
from lm.loss import logits_held
from lm.model import LanguageModel
from lm.quantization import PLANS, WIDE, Plan, layers
from lm.scheme import Float
from lm.static import Range
from tasks import paths
from tasks.bootstrap import Bootstrap, Estimate, Values
from tasks.errors import BadParameter
from tasks.quantize.params import Objective, QuantizeParams, SchemeName
from tasks.shards import WindowReader
from tasks.world import World

_RESAMPLES = 1000


@dataclass(frozen=True)
class Scheme:
    """``plan`` names one of :data:`lm.quantization.PLANS`, and ``rotated`` another for a model that is rotated."""

    plan: str
    fine_tuned: bool
    rotated: str | None = None


SCHEMES: dict[SchemeName, Scheme] = {
    "dynamic": Scheme("per-token-8", fine_tuned=False),
    "static": Scheme("static-8", fine_tuned=False),
    "weight-only-8": Scheme("blockwise-8", fine_tuned=False, rotated="blockwise-8-wide"),
    "qat": Scheme("per-token-8", fine_tuned=True),
    "weight-only-4": Scheme("blockwise-4", fine_tuned=True),
}


class Trial(BaseModel):
    """What one scheme does on the validation split, before or after fine-tuning.

    ``relative_loss`` is the loss over float's, minus 1, paired by window; ``kl_divergence`` that from float, in nats a
    token.
    """

    model_config = ConfigDict(frozen=True)

    scheme: SchemeName
    after: Literal["post-training", "fine-tuning"]
    relative_loss: Estimate
    kl_divergence: Estimate


class Quantization(BaseModel):
    """``models/int8/quantization.json``: the scheme of the model, and all that was tried on the way to it.

    ``objective`` is what fine-tuning went by, None where there was none.
    ``rotated``, ``compensated``, ``fine_tuned``: what makes it more than the float model rounded as ``plan`` says.
    ``ranges``: by product, what that rounding needs to know where it is ``static``; a turned model has others.
    """

    model_config = ConfigDict(frozen=True)

    asked: str
    scheme: SchemeName
    plan: str
    rotated: bool
    compensated: bool
    fine_tuned: bool
    objective: Objective | None
    in_float: tuple[str, ...]
    routers: FloatOrInt8
    norms: FloatOrInt8
    ranges: dict[str, Range]
    windows: int
    trials: tuple[Trial, ...]


def plan_name(name: SchemeName, params: QuantizeParams, config: ModelConfig) -> str:
    """Returns which of :data:`lm.quantization.PLANS` the scheme ``name`` is for a model of ``config``.

    A hidden size that is not whole wide blocks has narrow ones: filled up it would be no smaller, and a layer's experts
    no single operator.
    """
    scheme = SCHEMES[name]
    return scheme.rotated if scheme.rotated and params.rotate and config.hidden_size % WIDE == 0 else scheme.plan


def plan_of(name: SchemeName, params: QuantizeParams, config: ModelConfig) -> Plan:
    """Returns the scheme of each layer, without the ranges that ``static`` needs."""
    plan = PLANS[plan_name(name, params, config)]
    return dataclasses.replace(plan, in_float=params.in_float, routers=params.routers, norms=params.norms)


def check_in_float(model: LanguageModel, params: QuantizeParams) -> None:
    """Raises :class:`BadParameter` when every layer stays float."""
    plan = plan_of(params.candidates[0], params, model.config)
    if all(isinstance(plan.of(name), Float) for name in layers(model)):
        raise BadParameter(f"{paths.PARAMS}: quantize.in_float leaves no layer to quantize. Take a pattern out.")


class Measure:
    """A quantized model beside the float one on validation windows spread evenly over the split.

    Of conversations the answers alone count, as in training; windows without one are passed over.
    """

    def __init__(self, model: LanguageModel, windows: WindowReader, params: QuantizeParams, world: World) -> None:
        """``model`` is the float one, and nothing may change it."""
        self._windows, self._params, self._world = windows, params, world
        available = len(windows)
        count = min(params.validation_windows, available)
        chosen = np.arange(count) * available // count
        # [windows, T]: which targets count.
        counted = np.ones((count, windows.length)) if windows.learned is None else windows.learned.batch(chosen)[:, 1:]
        some = counted.any(axis=1)
        if not some.any():
            world.fail(
                BadParameter(f"{paths.PARAMS}: quantize.validation_windows: no answer lies in any of them. Raise it.")
            )
        self._chosen, self._counted = chosen[some], counted[some].astype(np.float64)
        self.count = len(self._chosen)
        self._float = model

    def trial(self, scheme: SchemeName, after: Literal["post-training", "fine-tuning"], model: LanguageModel) -> Trial:
        """Returns how ``model`` compares, with 95% intervals over windows."""
        ours, theirs, divergences = self._sums(model)
        bootstrap = Bootstrap(self.count, _RESAMPLES, self._params.seed)
        return Trial(
            scheme=scheme,
            after=after,
            relative_loss=bootstrap.ratio(ours - theirs, theirs),
            kl_divergence=bootstrap.ratio(divergences, self._counted.sum(axis=1)),
        )

    @torch.no_grad()
    def _sums(self, model: LanguageModel) -> Values:
        # [3, windows]: the loss of the model, that of float, and the divergence. Each process computes its share; the
        # others' places are zero until all are summed.
        world = self._world
        sums = torch.zeros(3, self.count, dtype=torch.float64, device=world.device)
        for one in (model, self._float):
            one.to(world.device).eval()
        # Of a long window and a large vocabulary all logits would be gigabytes.
        rows = max(1, logits_held(world.device.type) // model.config.vocab_size)
        for place in range(world.rank, self.count, world.size):
            window = torch.from_numpy(self._windows.batch(self._chosen[place : place + 1])).to(world.device).long()[0]
            counted = torch.from_numpy(self._counted[place]).to(world.device)
            hidden = [one.model(window[None, :-1]) for one in (model, self._float)]
            for start in range(0, len(window) - 1, rows):
                ours, theirs = (
                    F.log_softmax(one.lm_head(x_BTD[:, start : start + rows])[0].float(), dim=-1)
                    for one, x_BTD in zip((model, self._float), hidden, strict=True)
                )
                targets, weights = window[1:][start : start + rows], counted[start : start + rows]
                sums[0, place] += F.nll_loss(ours, targets, reduction="none").double() @ weights
                sums[1, place] += F.nll_loss(theirs, targets, reduction="none").double() @ weights
                apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
                sums[2, place] += apart.double() @ weights
        model.train()
        summed: Values = world.sum(sums).cpu().numpy()
        return summed
