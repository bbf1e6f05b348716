"""Embedding and head cut over their words (Megatron-LM, arXiv 1909.08053, section 3): no process has all logits.

The loss is computed from each process's columns; what travels are a maximum, a sum and the target's logit for each
token. Shape suffixes: B batch, T tokens, N all of them, D hidden size, V words of this process.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from lm.linear import Embedding
from lm.loss import LOGITS_AT_A_TIME, kept_gradient, projected_cross_entropy
from lm.model import LanguageModel
from tasks.parallel import tokens
from tasks.parallel.local import cut, local_parameters


def cut_vocabulary(model: LanguageModel, mesh: DeviceMesh, shards: int) -> None:
    """Cuts the embedding and the head of ``model`` over ``mesh`` (one axis), where they have not been left out.

    They stay whole where the words do not divide over it and, within it, over ``shards``.
    """
    if model.config.vocab_size % (mesh.size() * shards):
        return
    embedding, head = model.model.embed_tokens, model.lm_head
    is_tied = embedding.weight is head.weight
    # A pipeline's last stage may have one of its own.
    for module in model.modules():
        if isinstance(module, Embedding) and module.weight is not None:
            cut(module, "weight", mesh, Shard(0))
            module.forward = functools.partial(_rows, module, mesh)  # type: ignore[method-assign]
    if head.weight is not None:
        if is_tied:
            head.weight = embedding.weight
        else:
            cut(head, "weight", mesh, Shard(0))
        model.loss_of = functools.partial(_loss_of, model, mesh)  # type: ignore[method-assign]


def _rows(embedding: Embedding, mesh: DeviceMesh, ids_BT: torch.Tensor) -> torch.Tensor:
    with local_parameters(embedding):
        own_BT = ids_BT - mesh.get_local_rank() * len(embedding.weight)
        is_here = _is_here(own_BT, len(embedding.weight))
        rows_BTD = F.embedding(own_BT.where(is_here, 0), embedding.weight) * is_here.unsqueeze(-1)
    return tokens.whole_from_parts(rows_BTD, mesh.get_group())


def _loss_of(model: LanguageModel, mesh: DeviceMesh, x_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    with local_parameters(model.lm_head):
        weight, project = model.lm_head.weight, model.lm_head.project
    # The columns of each process make a part of the gradient.
    entered = tokens.whole_for_parts(x_BTD, mesh.get_group())
    own_N = targets_BT.flatten() - mesh.get_local_rank() * len(weight)
    measure = functools.partial(_cross_entropy, mesh.get_group())
    return projected_cross_entropy(
        lambda x: project(x, weight), entered.flatten(0, 1), own_N, len(weight), measure, [weight]
    )


def _cross_entropy(group: dist.ProcessGroup, logits_NV: torch.Tensor, own_N: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _CrossEntropy.apply(logits_NV, own_N, group)
    return result


def _is_here(own: torch.Tensor, words: int) -> torch.Tensor:
    return (own >= 0) & (own < words)


class _CrossEntropy(torch.autograd.Function):
    # As that of :mod:`lm.loss`: over the logits piece by piece, in fp32, keeping their gradient alone.
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, own_N: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        count, words = logits_NV.shape
        # A GPU has no such cache; many small kernels would cost more.
        rows = max(1, LOGITS_AT_A_TIME // words) if logits_NV.device.type == "cpu" else count
        top_N = logits_NV.amax(dim=1).float()
        dist.all_reduce(top_N, dist.ReduceOp.MAX, group=group)
        is_here_N = _is_here(own_N, words)
        own_N = own_N.where(is_here_N, 0)

        sums_N, chosen_N = summed = top_N.new_empty(2, count)
        for start in range(0, count, rows):
            piece, here = _piece(logits_NV, top_N, start, rows), slice(start, start + rows)
            chosen_N[here] = piece.gather(1, own_N[here].unsqueeze(1)).squeeze(1) * is_here_N[here]
            sums_N[here] = piece.exp_().sum(dim=1)
        dist.all_reduce(summed, group=group)

        if ctx.needs_input_grad[0]:
            gradient_NV = kept_gradient(logits_NV)
            target_N1 = is_here_N.unsqueeze(1) * top_N.new_tensor(-1 / count)
            for start in range(0, count, rows):
                piece, here = _piece(logits_NV, top_N, start, rows).exp_(), slice(start, start + rows)
                piece *= (1 / (count * sums_N[here])).unsqueeze(1)
                piece.scatter_add_(1, own_N[here].unsqueeze(1), target_N1[here])
                gradient_NV[here] = piece
            ctx.save_for_backward(gradient_NV)
            ctx.dtype = logits_NV.dtype
        return (sums_N.log() - chosen_N).sum() / count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (gradient_NV,) = ctx.saved_tensors
        return (gradient_NV * grad).to(ctx.dtype), None, None


def _piece(logits_NV: torch.Tensor, top_N: torch.Tensor, start: int, rows: int) -> torch.Tensor:
    here = slice(start, start + rows)
    return logits_NV[here].to(torch.float32, copy=True).sub_(top_N[here].unsqueeze(1))
