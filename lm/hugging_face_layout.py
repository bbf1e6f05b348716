"""Which tensors of Hugging Face's layout are which of :class:`lm.model.LanguageModel`.

On disk each expert has its own three matrices; in memory they are stacked. A head that is tied to the embedding is not
on disk. Layers of multi-token prediction follow the last one, each with a copy of embedding and head. All other tensors
have one name in both.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from lm.model import LanguageModel
from lm.weights import Region

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_MTP = re.compile(r"mtp\.(\d+)\.(.*)")
_STACKS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


class Piece(NamedTuple):
    """A tensor on disk, and where it lies in the model's: all of it, or some rows of one expert of a stack."""

    name: str
    region: Region
    is_of_stack: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the view of the model's ``tensor`` that this is."""
        found = tensor[self.region]
        return found.squeeze(0) if self.is_of_stack else found

    def shared(self, region: Region) -> tuple[Region, Region] | None:
        """Returns what ``region`` of the model's tensor has of this one: where in this, and where in that region."""
        both = [
            slice(max(own.start, wanted.start), min(own.stop, wanted.stop))
            for own, wanted in zip(self.region, region, strict=True)
        ]
        if any(part.start >= part.stop for part in both):
            return None
        here, there = (_moved(both, origin) for origin in (self.region, region))
        return here[self.is_of_stack :], there


def _moved(parts: list[slice], origin: Region) -> Region:
    return tuple(slice(part.start - of.start, part.stop - of.start) for part, of in zip(parts, origin, strict=True))


def pieces_of(model: LanguageModel) -> dict[str, list[Piece]]:
    """Returns for each tensor of ``model``, which may be on ``meta``, what is on disk of it."""
    first = model.config.num_hidden_layers
    return {
        name: [piece._replace(name=_name_on_disk(piece.name, first)) for piece in _pieces(name, tensor.shape)]
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }


def copies_of(model: LanguageModel) -> dict[str, str]:
    """Returns by name what each layer of multi-token prediction has once more, as published ones do."""
    first, found = model.config.num_hidden_layers, {}
    embedding = "model.embed_tokens.weight"
    head = embedding if model.config.tie_word_embeddings else "lm_head.weight"
    for depth in range(len(model.mtp)):
        found[f"model.layers.{first + depth}.embed_tokens.weight"] = embedding
        found[f"model.layers.{first + depth}.shared_head.head.weight"] = head
    return found


def state_to_layout(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of ``state`` under the names of the layout, experts one by one, each a view."""
    return {piece.name: piece.of(tensor) for name, tensor in state.items() for piece in _pieces(name, tensor.shape)}


def layout_to_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of the layout under the names of :class:`LanguageModel`, experts stacked."""
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
        else:
            state[name] = tensor
    for prefix, parts in experts.items():
        ordered = [parts[index] for index in range(len(parts))]
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([part["gate"], part["up"]]) for part in ordered])
        state[f"{prefix}.down_proj"] = torch.stack([part["down"] for part in ordered])
    return state


def _pieces(name: str, shape: torch.Size) -> Iterator[Piece]:
    if not name.endswith(_STACKS):
        yield Piece(name, tuple(slice(0, size) for size in shape), False)
        return
    experts, rows, columns = shape
    prefix, _, stack = name.rpartition(".")
    parts = ("gate", "up") if stack == "gate_up_proj" else ("down",)
    each = rows // len(parts)
    for expert in range(experts):
        for number, part in enumerate(parts):
            own = slice(number * each, (number + 1) * each)
            region = slice(expert, expert + 1), own, slice(0, columns)
            yield Piece(f"{prefix}.{expert}.{part}_proj.weight", region, True)


def _name_on_disk(name: str, first: int) -> str:
    # The layers of multi-token prediction follow the others, whose last is the one before `first`.
    match = _MTP.fullmatch(name)
    if match is None:
        return name
    own = match[2].removeprefix("block.")
    return f"model.layers.{first + int(match[1])}.{'shared_head.' if own == 'norm.weight' else ''}{own}"
