"""Activation checkpointing: a layer's backward pass computes what it needs once more (arXiv 1604.06174).

It is put on a model from outside. The gradients keep their bits; memory goes down and time goes up.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lm.feed_forward import Router
from lm.model import LanguageModel

Recomputation = Literal["none", "selective", "full"]

# The products with weights: most of the arithmetic. Attention's own products (bmm) are not among them, because what
# they make grows with the square of the length; nor are sums, norms, gates and rotations, which are cheap.
_KEPT = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._grouped_mm.default}
# FSDP2 marks for the profiler what it does within a layer, which is more the second time.
SAC_IGNORED_OPS.update(
    (torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction)
)


def recompute(model: LanguageModel, which: Recomputation) -> None:
    """Makes each layer of ``model`` compute its activations again in the backward pass, in place.

    ``full`` keeps the input of each layer alone; ``selective`` keeps the results of the products with weights too, so
    that only what is cheap is computed again (arXiv 2205.05198, section 5).
    """
    if which == "none":
        return
    for layer in model.blocks():
        contexts = functools.partial(_contexts, layer, which == "selective")
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


def _contexts(layer: nn.Module, selective: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns what is around the first computation of ``layer`` and what is around the second."""
    if not selective:
        return contextlib.nullcontext(), _uncounted(layer)
    first, second = create_selective_checkpoint_contexts(_policy)
    return first, _both(second, _uncounted(layer))


def _policy(context: object, operator: object, *arguments: object, **more: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


@contextlib.contextmanager
def _uncounted(layer: nn.Module) -> Iterator[None]:
    # A router that sees its tokens a second time would count them twice (torchtitan#1593).
    routers = [module for module in layer.modules() if isinstance(module, Router)]
    for router in routers:
        router.counts = False
    try:
        yield
    finally:
        for router in routers:
            router.counts = True
