"""Expert parallelism (GShard, arXiv 2006.16668, section 3.1): each process has some of the experts, tokens travel.

Shape suffixes: N tokens, K experts a token, E experts, P processes of the axis, M tokens that came here, D hidden size.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from lm.feed_forward import Experts
from lm.linear import to_product_type
from tasks.parallel import tokens
from tasks.parallel.local import cut, local_parameters


def deal_out(experts: Experts, mesh: DeviceMesh) -> None:
    """Leaves each process of ``mesh`` (one axis) its consecutive share of ``experts``, and lets tokens travel."""
    for module in experts.modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            cut(module, name, mesh, Shard(0))
    experts.forward = functools.partial(_forward, experts, mesh.get_group())  # type: ignore[method-assign]


def _forward(
    experts: Experts,
    group: dist.ProcessGroup,
    x_ND: torch.Tensor,
    experts_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Does what ``Experts.forward`` does, with the tokens of all processes of ``group`` and the experts of this one."""
    with local_parameters(experts):
        processes, held = group.size(), len(experts.gate_up_proj)
        chosen = experts_NK.flatten()
        order = chosen.argsort(stable=True)
        sent_PE = torch.bincount(chosen, minlength=processes * held).view(processes, held)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE, group=group)
        sent, received = sent_PE.sum(dim=1).tolist(), received_PE.sum(dim=1).tolist()

        travelling = to_product_type(x_ND).index_select(0, order // experts_NK.shape[1])
        x_MD = tokens.exchanged(travelling, sent, received, group)
        # What came from one process is sorted by expert.
        own = torch.arange(held, device=chosen.device).repeat(processes).repeat_interleave(received_PE.flatten())
        y_MD = Experts.forward(experts, x_MD, own.unsqueeze(1), x_MD.new_ones(len(own), 1))
    returned = tokens.exchanged(y_MD, received, sent, group)
    y_NKD = returned.index_select(0, order.argsort()).unflatten(0, experts_NK.shape)
    return (y_NKD * weights_NK.unsqueeze(-1)).sum(dim=1)
