"""Tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3) with sequence parallelism (arXiv 2205.05198, section
4.2.2): heads and inner columns are cut, and between them tokens.

A region (an attention, a dense feed-forward) computes a part of its output in each process, from the same input: the
inputs of all tokens are gathered, its outputs are summed, and each process keeps its share of the tokens. Going back it
is the other way round. Norms, residuals, routers, routed experts and the gates of shared ones see that share alone.
Weights that work on a share, or on some of the heads, are whole in each process, which has a part of their gradient;
the parts are summed once a step. Embedding and head are cut over their words (:mod:`tasks.parallel.vocabulary`) and see
all tokens, and so do the blocks of multi-token prediction, whose tokens are fewer by one and do not divide.
"""

import functools
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from lm.feed_forward import MixtureOfExperts, SwiGLU
from lm.grouped import GroupedAttention
from lm.latent import LatentAttention
from lm.linear import Linear, to_product_type
from lm.low_rank import LowRank
from lm.model import LanguageModel
from tasks.parallel import tokens, whole
from tasks.parallel.local import cut, local_parameters

# The layers whose outputs, and those whose inputs, are heads or inner columns. All others of a region stay whole.
CUT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
CUT_INPUTS = ("o_proj", "down_proj")
Forward = Callable[..., torch.Tensor]


# What is larger is summed by itself: a copy of all experts' gradients would cost more than a message.
_SUMMED_TOGETHER = 2**16


class InParts:
    """The weights that are whole in each process, of whose gradients each has a part."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        # Looked up when they are needed: FSDP puts others in their place.
        self._places: list[tuple[nn.Module, str]] = []

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Adds the weights of ``modules`` and of all that is in them."""
        for module in modules:
            for part in module.modules():
                self.add_some(part, [name for name, _ in part.named_parameters(recurse=False)])

    def add_some(self, module: nn.Module, names: Iterable[str]) -> None:
        self._places += [(module, name) for name in names]

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Sums the parts that lie there after the last backward pass of a step. Collective."""
        found = [getattr(module, name).grad for module, name in self._places]
        parts = [whole.local(gradient) for gradient in found if gradient is not None]
        small = []
        for part in parts:
            if part.numel() > _SUMMED_TOGETHER and part.is_contiguous():
                dist.all_reduce(part, group=self._group)
            else:
                small.append(part)
        if small:
            flat = torch.cat([part.flatten() for part in small])
            dist.all_reduce(flat, group=self._group)
            for part, summed in zip(small, flat.split([part.numel() for part in small]), strict=True):
                part.copy_(summed.view_as(part))


def cut_regions(model: LanguageModel, mesh: DeviceMesh) -> InParts:
    """Cuts every attention and dense feed-forward of ``model``, and the tokens between them, over ``mesh`` (one axis).

    Weights may be laid over other axes later. What is returned sums the gradients of those that stay whole.
    """
    group = mesh.get_group()
    in_parts = InParts(group)
    for layer in model.model.layers:
        _cut_regions(layer, mesh, in_parts, tokens.gathered_for_parts, tokens.dealt_from_parts)
        in_parts.add([layer.get_submodule("input_layernorm"), layer.get_submodule("post_attention_layernorm")])
        if isinstance(layer.mlp, MixtureOfExperts):
            of_share = layer.mlp.gate, layer.mlp.experts, layer.mlp.shared_expert_gate
            in_parts.add(module for module in of_share if module is not None)
            # Of each sequence a process has a share.
            layer.mlp.gate.sum_counts = functools.partial(_summed, group)
    first, last = model.model.layers[0], model.model.norm
    first.forward = functools.partial(_enter, first.forward, group)
    in_parts.add([last])
    last.forward = functools.partial(_leave, last.forward, group)  # type: ignore[method-assign]
    for further in model.mtp:
        _cut_regions(further, mesh, in_parts, tokens.whole_for_parts, tokens.whole_from_parts)
    return in_parts


def _cut_regions(block: nn.Module, mesh: DeviceMesh, in_parts: InParts, enter: tokens.Move, leave: tokens.Move) -> None:
    for region in block.modules():
        if not isinstance(region, SwiGLU | GroupedAttention | LatentAttention):
            continue
        for name, layer in region.named_children():
            if name not in CUT_OUTPUTS + CUT_INPUTS:
                in_parts.add([layer])
                continue
            along = 0 if name in CUT_OUTPUTS else 1
            assert isinstance(layer, Linear)
            # A layer of another stage of a pipeline has none.
            for parameter, _ in list(layer.named_parameters(recurse=False)):
                if parameter == "bias" and name in CUT_INPUTS:
                    layer.bias_share = float(mesh.get_local_rank() == 0)
                    in_parts.add_some(layer, ["bias"])
                else:
                    cut(layer, parameter, mesh, Shard(along))
            factors = getattr(layer, "project", None)
            if isinstance(factors, LowRank):
                # One has the layer's outputs or inputs; the other is whole, with a part of its gradient.
                for parameter, _ in list(factors.named_parameters(recurse=False)):
                    if parameter == ("lora_B" if name in CUT_OUTPUTS else "lora_A"):
                        cut(factors, parameter, mesh, Shard(along))
                    else:
                        in_parts.add_some(factors, [parameter])
            if name in CUT_OUTPUTS:
                layer.out_features //= mesh.size()
        region.forward = functools.partial(  # type: ignore[method-assign]
            _forward, region, region.forward, mesh.get_group(), enter, leave
        )


def _summed(group: dist.ProcessGroup, counts: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(counts, group=group)
    return counts


def _forward(
    region: nn.Module,
    forward: Forward,
    group: dist.ProcessGroup,
    enter: tokens.Move,
    leave: tokens.Move,
    x: torch.Tensor,
    *rest: torch.Tensor,
) -> torch.Tensor:
    with local_parameters(region):
        # In the type of the products half the bytes travel.
        return leave(forward(enter(to_product_type(x), group), *rest), group)


def _enter(forward: Forward, group: dist.ProcessGroup, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return forward(tokens.share_of_whole(x, group), *rest)


def _leave(forward: Forward, group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    return tokens.whole_of_shares(forward(x), group)
