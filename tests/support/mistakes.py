"""Mistakes in the layout of a model over processes, for :mod:`meshes`; each returns what mends it, if need be."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lm import low_rank
from lm.feed_forward import Experts
from tasks import optimizers
from tasks.parallel import tensor, tokens, whole
from tasks.parallel.stages import Stage
from tasks.trainer import Trainer


def replaced(place: Any, name: str, value: Any) -> Callable[[], None]:
    before = getattr(place, name)
    setattr(place, name, value)
    return lambda: setattr(place, name, before)


def _no_sum_over_replicas(trainer: Trainer) -> Callable[[], None]:
    assert trainer.world.mesh is not None
    replicas, reduce = trainer.world.mesh.dense["replicate"].get_group(), dist.all_reduce

    def skipping(*values: Any, group: Any = None, **options: Any) -> Any:
        return None if group is replicas else reduce(*values, group=group, **options)

    return replaced(dist, "all_reduce", skipping)


def _no_sum_at_all(trainer: Trainer) -> None:
    reduce = trainer.parallel.reduce_in_backward
    trainer.parallel.reduce_in_backward = lambda _: reduce(False)  # type: ignore[method-assign]


def _no_mean(trainer: Trainer) -> None:
    trainer.parallel.weight = 1.0


def _norm_of_a_part(trainer: Trainer) -> Callable[[], None]:
    return replaced(whole.dist, "all_reduce", lambda *_, **__: None)


def _no_sum_over_tensor(trainer: Trainer) -> Callable[[], None]:
    # What is dealt is one part of each output.
    return replaced(tokens, "_dealt", tokens._share)


def _no_sum_over_shares(trainer: Trainer) -> Callable[[], None]:
    return replaced(tensor.InParts, "sum_gradients", lambda _: None)


def _no_sum_of_factors(trainer: Trainer) -> None:
    parts = trainer.parallel._in_parts  # type: ignore[attr-defined]
    parts._places = [place for place in parts._places if type(place[0]) is not low_rank.LowRank]


def _no_sum_over_words(trainer: Trainer) -> Callable[[], None]:
    return replaced(tokens, "whole_for_parts", lambda x, group: x)


def _experts_divided_alone(trainer: Trainer) -> None:
    for module in trainer.model.modules():
        if isinstance(module, Experts):
            module.set_gradient_divide_factor(2.0)  # type: ignore[operator]


def infinite_loss() -> Callable[[], None]:
    finite = Stage.loss
    return replaced(Stage, "loss", lambda *arguments: finite(*arguments) * float("inf"))


def _no_gradient_of_one(trainer: Trainer) -> Callable[[], None]:
    whole_loss, calls = Stage.loss, itertools.count()

    def without(*arguments: Any) -> torch.Tensor:
        found = whole_loss(*arguments)
        return found.detach() + 0 * found if next(calls) == 1 else found

    return replaced(Stage, "loss", without)


def _answers_by_themselves(trainer: Trainer) -> None:
    counted = trainer.parallel.loss
    trainer.parallel.loss = lambda windows, over: counted(windows, 1.0) / over  # type: ignore[method-assign]


def _copies_apart(trainer: Trainer) -> None:
    trainer.parallel._add_up_copies = lambda: None  # type: ignore[attr-defined]


def _own_statistics(trainer: Trainer) -> None:
    summed = trainer.world.sum_all
    # What is counted is a matrix, layers by experts; what else is summed is a few numbers.
    object.__setattr__(trainer.world, "sum_all", lambda values: values if values.dim() == 2 else summed(values))


def _own_tokens_of_a_sequence(trainer: Trainer) -> None:
    for router in trainer.model.routers():
        router.sum_counts = lambda counts: counts


def _each_part_by_itself(trainer: Trainer) -> Callable[[], None]:
    right = optimizers._of_whole_matrices
    optimizers._of_whole_matrices = lambda change, part, like: change(part)

    def mend() -> None:
        optimizers._of_whole_matrices = right

    return mend


MISTAKES: dict[str, Callable[[Trainer], Callable[[], None] | None]] = {
    "the replicas' gradients are not summed": _no_sum_over_replicas,
    "the gradients are each process's own": _no_sum_at_all,
    "the gradients are summed, not averaged": _no_mean,
    "each process clips by the norm of its part": _norm_of_a_part,
    "parts of an output are not summed over tensor": _no_sum_over_tensor,
    "gradients of shares of the tokens are not summed over tensor": _no_sum_over_shares,
    "the other factors' gradients are not summed over tensor": _no_sum_of_factors,
    "parts of the logits' gradient are not summed over tensor": _no_sum_over_words,
    "the experts' gradients are divided again": _experts_divided_alone,
    "each process counts its own tokens alone": _own_statistics,
    "a sequence's tokens are not summed over tensor": _own_tokens_of_a_sequence,
    "the gradient of one micro-batch is missing": _no_gradient_of_one,
    "the pipeline's answers are not counted over the batch": _answers_by_themselves,
    "the copies of tied weights have gradients of their own": _copies_apart,
    "each part is orthogonalized": _each_part_by_itself,
}
