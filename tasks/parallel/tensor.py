"""Tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3) with sequence parallelism (arXiv 2205.05198, section
4.2.2): heads and inner columns are cut, and between them tokens.

A region (an attention, a dense feed-forward) computes a part of its output in each process, from the same input: the
inputs of all tokens are gathered, its outputs are summed, and each process keeps its share of the tokens. Going back it
is the other way round. Norms, residuals, routers and routed experts see that share alone; their weights are whole in
each process (experts but for the axis ``expert``), and their gradients are summed. Embedding and head are cut over
their words (:mod:`tasks.parallel.vocabulary`) and see all tokens, and so do the blocks of multi-token prediction, whose
tokens are fewer by one and do not divide.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lm.feed_forward import MixtureOfExperts, SwiGLU
from lm.grouped import GroupedAttention
from lm.latent import LatentAttention
from lm.linear import Linear, to_product_type
from lm.model import LanguageModel
from tasks.parallel.local import cut, local_parameters

# The layers whose outputs, and those whose inputs, are heads or inner columns. All others of a region stay whole.
CUT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
CUT_INPUTS = ("o_proj", "down_proj")
# Of hidden states [B, T, D] on one axis of processes: all tokens are in each, or each has its share of them.
WHOLE, SHARE = Replicate(), Shard(1)
Forward = Callable[..., torch.Tensor]


def cut_regions(model: LanguageModel, mesh: DeviceMesh, deals_out_experts: bool) -> None:
    """Cuts every attention and dense feed-forward of ``model``, and the tokens between them, over ``mesh`` (one axis).

    ``deals_out_experts``: routed experts are left as they are, to be dealt out over another axis as well.
    """
    for layer in model.model.layers:
        _cut_regions(layer, mesh, SHARE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _see_share(layer.get_submodule(norm), mesh)
        if isinstance(layer.mlp, MixtureOfExperts):
            _see_share(layer.mlp.gate, mesh)
            if not deals_out_experts:
                _see_share(layer.mlp.experts, mesh)
    first, last = model.model.layers[0], model.model.norm
    first.forward = functools.partial(_enter, first.forward, mesh)
    _see_share(last, mesh)
    last.forward = functools.partial(_leave, last.forward, mesh)  # type: ignore[method-assign]
    for further in model.mtp:
        _cut_regions(further, mesh, WHOLE)


def sees_share(layer: nn.Module) -> bool:
    """Whether the block ``layer`` was cut so that it has a share of the tokens."""
    return isinstance(layer.get_parameter("input_layernorm.weight"), DTensor)


def _cut_regions(block: nn.Module, mesh: DeviceMesh, tokens: Placement) -> None:
    for module in block.modules():
        if isinstance(module, SwiGLU | GroupedAttention | LatentAttention):
            _cut_region(module, mesh, tokens)


def _cut_region(region: nn.Module, mesh: DeviceMesh, tokens: Placement) -> None:
    for name, layer in region.named_children():
        for parameter, _ in list(layer.named_parameters(recurse=False)):
            cut(layer, parameter, mesh, _placement(name))
        if name in CUT_OUTPUTS:
            assert isinstance(layer, Linear)
            layer.out_features //= mesh.size()
    region.forward = functools.partial(_forward, region, region.forward, mesh, tokens)


def _placement(layer: str) -> Placement:
    if layer in CUT_OUTPUTS:
        return Shard(0)
    return Shard(1) if layer in CUT_INPUTS else Replicate()


def _forward(
    region: nn.Module, forward: Forward, mesh: DeviceMesh, tokens: Placement, x: torch.Tensor, *rest: torch.Tensor
) -> torch.Tensor:
    with local_parameters(region):
        # In the type of the products half the bytes travel.
        entered = _moved(to_product_type(x), mesh, tokens, WHOLE, gradient=Partial())
        y = forward(entered, *rest)
    return _moved(y, mesh, Partial(), tokens)


def _see_share(module: nn.Module, mesh: DeviceMesh) -> None:
    for name, _ in list(module.named_parameters(recurse=False)):
        cut(module, name, mesh, Replicate())
    module.forward = functools.partial(_forward_share, module, module.forward)


def _forward_share(module: nn.Module, forward: Forward, *arguments: torch.Tensor) -> torch.Tensor:
    with local_parameters(module):
        return forward(*arguments)


def _enter(forward: Forward, mesh: DeviceMesh, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return forward(_moved(x, mesh, WHOLE, SHARE), *rest)


def _leave(forward: Forward, mesh: DeviceMesh, x: torch.Tensor) -> torch.Tensor:
    return _moved(forward(x), mesh, SHARE, WHOLE)


def _moved(
    x: torch.Tensor, mesh: DeviceMesh, here: Placement, there: Placement, gradient: Placement | None = None
) -> torch.Tensor:
    """Returns ``x``, which lies on ``mesh`` as ``here``, as it lies ``there``; what comes back lies as ``gradient``."""
    laid = DTensor.from_local(x, mesh, [here], run_check=False).redistribute(placements=[there])
    moved: torch.Tensor = laid.to_local(grad_placements=None if gradient is None else [gradient])
    return moved
