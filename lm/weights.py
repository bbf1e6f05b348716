"""A model's weights one after the other, and of each what is needed: nobody has to hold them all.

Weights are an iterator over names and what reads them. A model without any is built by :func:`on_meta`, laid out, and
given its own by :func:`fill`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.rope import rotations_of

Region = tuple[slice, ...]
"""From where to where, in each dimension."""
Read = Callable[[Region], torch.Tensor]
"""Returns that part of a tensor in fp32, on the CPU: a copy, but for a model that is only read."""
Weights = Iterator[tuple[str, Read]]
"""Each is there once: who has read one goes on to the next."""
Whole = Callable[[str], torch.Tensor]
"""Returns the weight or buffer of that name; on the device ``meta`` where its numbers are not asked for."""
Make = Callable[[nn.Parameter, Read], torch.Tensor]


def shapes(config: ModelConfig) -> LanguageModel:
    """Returns a model that is shapes alone, on the device ``meta``."""
    with torch.device("meta"):
        return LanguageModel(config)


def on_meta(config: ModelConfig) -> LanguageModel:
    """Returns a model whose parameters are shapes alone, on the device ``meta``; its buffers are as in a new one."""
    return with_buffers(shapes(config))


def with_buffers(model: LanguageModel) -> LanguageModel:
    """Gives ``model``, which is shapes alone, the buffers of a new one, in place, and returns it."""
    for module in model.modules():
        for name, value in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(value, device="cpu"))
    model.model.rotations = rotations_of(model.config)
    return model


def drawn(model: LanguageModel, seed: int) -> Weights:
    """Yields the weights that :meth:`LanguageModel.initialize` draws; ``model`` may be on ``meta``."""
    for name, value in model.drawn(seed):
        yield name, reads(value)


def reads(value: torch.Tensor) -> Read:
    """Returns what reads a tensor that is there."""
    return lambda region: value[region].clone()


def taken(model: nn.Module) -> Weights:
    """Leaves the parameters of ``model`` on ``meta``, in place, and yields the numbers that they had.

    Each is let go when the next one is asked for.
    """
    found = dict(model.named_parameters())
    left = {
        value: nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
        for value in found.values()
    }
    for module in model.modules():
        for own, value in list(module._parameters.items()):
            if value is not None:
                module.register_parameter(own, left[value])
    left.clear()
    return _given(found)


def _given(found: dict[str, nn.Parameter]) -> Weights:
    while found:
        name = next(iter(found))
        yield name, reads(found.pop(name).detach())


def whole_region(shape: Iterable[int]) -> Region:
    """Returns the region that is all of a tensor of ``shape``."""
    return tuple(slice(0, size) for size in shape)


def _all_of(parameter: nn.Parameter, read: Read) -> torch.Tensor:
    return read(whole_region(parameter.shape))


@torch.no_grad()
def fill(model: nn.Module, weights: Weights, make: Make = _all_of, copies: Mapping[str, str] | None = None) -> None:
    """Gives each parameter of ``model`` that is on ``meta``, and each persistent buffer, its numbers, in place.

    ``make`` returns what a parameter becomes, of the same layout. ``copies``: what parameters with another name are a
    copy of. Tied parameters stay one. Raises :class:`ValueError` that names one of which there are no weights.
    """
    source = copies or {}
    places: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            places.setdefault(source.get(name, name), []).append(parameter)
    buffers, made = dict(model.named_buffers()), {}
    for name, read in weights:
        for parameter in places.get(name, ()):
            made[parameter] = nn.Parameter(make(parameter, read), requires_grad=parameter.requires_grad)
        if name in buffers:
            buffers[name].copy_(read(whole_region(buffers[name].shape)))
    for module in model.modules():
        for own, value in list(module._parameters.items()):
            if value in made:
                module.register_parameter(own, made[value])
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"there are no weights for {missing[0]}, nor for {len(missing) - 1} others")


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """Returns the parameter or buffer of that name."""
    path, _, own = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), own)
    return found


def held_by(model: nn.Module) -> Whole:
    """Returns :data:`Whole` of a model that has all its weights."""
    return lambda name: tensor_of(model, name).detach().cpu()
