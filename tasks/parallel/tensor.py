"""Tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3): heads and inner columns are cut, tokens are not.

A region (an attention, a dense feed-forward) computes a part of its output in each process, from the same input: its
outputs are summed, and so are the gradients of its input. Embedding and head are cut over their words
(:mod:`tasks.parallel.vocabulary`). The routed experts and the norms between regions are whole in each process.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lm.feed_forward import SwiGLU
from lm.grouped import GroupedAttention
from lm.latent import LatentAttention
from lm.linear import Linear
from lm.model import LanguageModel
from tasks.parallel.local import cut, local_parameters

# The layers whose outputs, and those whose inputs, are heads or inner columns. All others of a region stay whole.
CUT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
CUT_INPUTS = ("o_proj", "down_proj")


def cut_regions(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Cuts every attention and dense feed-forward of ``model`` over ``mesh`` (one axis)."""
    for module in model.modules():
        if isinstance(module, SwiGLU | GroupedAttention | LatentAttention):
            _cut_region(module, mesh)


def _cut_region(region: nn.Module, mesh: DeviceMesh) -> None:
    for name, layer in region.named_children():
        for parameter, _ in list(layer.named_parameters(recurse=False)):
            cut(layer, parameter, mesh, _placement(name))
        if name in CUT_OUTPUTS:
            assert isinstance(layer, Linear)
            layer.out_features //= mesh.size()
    region.forward = functools.partial(_forward, region, region.forward, mesh)


def _placement(layer: str) -> Placement:
    if layer in CUT_OUTPUTS:
        return Shard(0)
    return Shard(1) if layer in CUT_INPUTS else Replicate()


def _forward(
    region: nn.Module, forward: Callable[..., torch.Tensor], mesh: DeviceMesh, x: torch.Tensor, *rest: torch.Tensor
) -> torch.Tensor:
    with local_parameters(region):
        entered = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        y = forward(entered, *rest)
    return DTensor.from_local(y, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
