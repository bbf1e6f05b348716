"""The loss on windows that are held out from training."""

from collections.abc import Callable

import torch

from tasks.parallel.parallelize import Parallel
from tasks.process import Process
from tasks.shards import WindowReader, share_learned
from tasks.training_params import TrainingParams


@torch.no_grad()
def validate(
    parallel: Parallel, windows: WindowReader, params: TrainingParams, process: Process, told_to_end: Callable[[], bool]
) -> float | None:
    """Returns the mean loss, in nats a token, over windows spread evenly over ``windows``. Collective.

    None where ``told_to_end``, asked before each batch, says so: on large splits this may take longer than a process
    that is told to end has. It has to say the same in all processes.
    """
    world, available = process.world, len(windows)
    wanted = min(params.validation_windows, available)
    chosen = torch.arange(wanted) * available // wanted
    mine = chosen[world.data_rank :: world.data_size].numpy()
    # Each process computes as often as the first one, which has most: the parts of a layer come from all of them.
    most = len(chosen[:: world.data_size])
    summed = torch.zeros((), dtype=torch.float64, device=world.device)
    parallel.model.eval()
    try:
        for start in range(0, most, params.micro_batch):
            if told_to_end():
                return None
            share = mine[start : start + params.micro_batch]
            batch = process.read(windows, share if len(share) else chosen[:1].numpy())
            with world.autocast():
                summed += parallel.evaluate(batch).double() * len(share)
    finally:
        parallel.model.train()
    return float(world.sum(summed) / (wanted * share_learned(windows, chosen.numpy())))
