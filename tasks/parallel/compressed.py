"""Gradients that replicas exchange in fewer bytes, each process keeping back what it could not say (error feedback).

Shape suffixes: E matrices of a stack, A and B their sides, R the rank, N processes, K elements of a chunk.
"""

from abc import abstractmethod
from pathlib import Path

import torch
import torch.distributed as dist

from lm.model import LanguageModel
from tasks.errors import BadInput
from tasks.exchange_params import Compression
from tasks.parallel import parts
from tasks.parallel.exchange import Exchange, averaged, equal_weights
from tasks.world import World

_BLOCK = 256


def compressed(model: LanguageModel, world: World, compression: Compression, rank: int, seed: int) -> "Compressed":
    """Returns the exchange that ``compression`` names; ``rank`` and ``seed`` are PowerSGD's."""
    if compression == "powersgd":
        return PowerSGD(model, world, rank, seed)
    return Int8(model, world)


class Compressed(Exchange):
    """A gradient exchange whose error each process adds to its next gradient (arXiv 1901.09847)."""

    def __init__(self, model: LanguageModel, world: World) -> None:
        super().__init__(world)
        self.world = world
        self._model = model
        # What is frozen has no gradient to exchange.
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # No broadcast, which would cost as much as a step does without compression.
        self._check_equal("models/init or the packages differ between machines; make them equal and start again.")

    def reduce(self, loss: torch.Tensor) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            if not self._reduce([value.grad for value in self._parameters if value.grad is not None], loss):
                for parameter in self._parameters:
                    assert parameter.grad is not None
                    parameter.grad.fill_(torch.nan)

    @abstractmethod
    def _reduce(self, gradients: list[torch.Tensor], loss: torch.Tensor) -> bool:
        """Averages ``gradients`` in place and keeps the error, or returns False where one is not finite."""

    def state(self) -> dict[str, torch.Tensor]:
        self._check_equal("kinds of processors that round differently cannot train together with train.compression.")
        return self._tensors()

    def load_state(self, folder: Path) -> None:
        parts.read(self._tensors(), folder)

    @abstractmethod
    def _tensors(self) -> dict[str, torch.Tensor]:
        """Returns what goes from step to step; what each process has for itself has its rank in the name."""

    def _check_equal(self, reason: str) -> None:
        if not equal_weights(self._model, self.world):
            self.world.fail(BadInput(f"the processes have different weights: {reason}"))


class PowerSGD(Compressed):
    """The gradient's projection on a few directions, which follow it from step to step (arXiv 1905.13727, algorithm 1).

    A stack of experts is a batch of matrices. What is smaller than its projection, vectors above all, is sent as it is.
    """

    def __init__(self, model: LanguageModel, world: World, rank: int, seed: int) -> None:
        super().__init__(model, world)
        self._rank = rank
        self._errors: dict[int, torch.Tensor] = {}
        self._directions: dict[int, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for number, parameter in enumerate(self._parameters):
            if pays(parameter.shape, rank):
                *stack, _, columns = parameter.shape
                drawn = torch.randn(*stack, columns, rank, generator=generator)
                self._directions[number] = drawn.to(parameter)
                self._errors[number] = torch.zeros_like(parameter)

    def _reduce(self, gradients: list[torch.Tensor], loss: torch.Tensor) -> bool:
        matrices = {number: gradients[number] + error for number, error in self._errors.items()}
        plain = [gradient for number, gradient in enumerate(gradients) if number not in matrices]
        projected = [matrix_EAB @ self._directions[number] for number, matrix_EAB in matrices.items()]
        # The loss goes along, so that all know of one that is not finite before anything is kept.
        means = self._mean([*projected, *plain, loss.to(plain[0] if plain else projected[0]).reshape(1)])
        if means is None:
            return False
        for gradient, mean in zip(plain, means[len(projected) :], strict=False):
            gradient.copy_(mean)
        bases = [torch.linalg.qr(mean_EAR).Q for mean_EAR in means[: len(projected)]]
        backs = self._mean([matrix.mT @ basis for matrix, basis in zip(matrices.values(), bases, strict=True)])
        if backs is None:
            return False
        for (number, matrix_EAB), basis_EAR, back_EBR in zip(matrices.items(), bases, backs, strict=True):
            torch.matmul(basis_EAR, back_EBR.mT, out=gradients[number])
            self._errors[number] = matrix_EAB.sub_(gradients[number])
            self._directions[number] = back_EBR.clone()
        return True

    def _mean(self, tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """Returns the means over the processes, which are parts of one buffer; None where one is not finite."""
        if not tensors:
            return []
        flat, means = averaged(tensors, self.world.size)
        return means if flat.isfinite().all() else None

    def _tensors(self) -> dict[str, torch.Tensor]:
        errors = {f"error-{self.world.rank}.{number}": value for number, value in self._errors.items()}
        return errors | {f"directions.{number}": value for number, value in self._directions.items()}


def pays(shape: torch.Size, rank: int) -> bool:
    """Whether a matrix, or a stack of them, of ``shape`` has more elements than its two factors of ``rank``."""
    return len(shape) > 1 and rank * (shape[-2] + shape[-1]) < shape[-2] * shape[-1]


class Int8(Compressed):
    """Each element a byte, with a scale for each block of 256: summed by all-to-all, shared by all-gather.

    Rounded twice: what a process sends of its own gradient, and what it sends of the mean of its chunk. It feeds both
    errors back.
    """

    def __init__(self, model: LanguageModel, world: World) -> None:
        super().__init__(model, world)
        # One more for the loss.
        self._count = sum(parameter.numel() for parameter in self._parameters) + 1
        self._error_NK = chunks(self._count, world.size, self._parameters[0].device)
        self._error_K = torch.zeros_like(self._error_NK[0])

    def _reduce(self, gradients: list[torch.Tensor], loss: torch.Tensor) -> bool:
        sent_NK = torch.zeros_like(self._error_NK)
        flat = sent_NK.view(-1)
        torch.cat([*(gradient.flatten().float() for gradient in gradients), loss.float().reshape(1)],
                  out=flat[: self._count])  # fmt: skip
        sent_NK += self._error_NK
        error_K = self._error_K.clone()
        means = mean_of_bytes(sent_NK, error_K).view(-1)[: self._count]
        if not means.isfinite().all():
            return False
        self._error_NK, self._error_K = sent_NK, error_K
        # The loss is told, not learned from.
        self._error_NK.view(-1)[self._count - 1] = 0
        if (place := self._count - 1 - self.world.rank * len(self._error_K)) in range(len(self._error_K)):
            self._error_K[place] = 0
        for gradient, mean in zip(gradients, means[:-1].split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))
        return True

    def _tensors(self) -> dict[str, torch.Tensor]:
        rank = self.world.rank
        return {f"error-{rank}.sent": self._error_NK, f"error-{rank}.mean": self._error_K}


def mean_of_bytes(
    sent_NK: torch.Tensor, kept_K: torch.Tensor | None = None, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Returns the mean of ``sent_NK`` over the N processes of ``group``, the same bits in each. Collective.

    Each process makes the mean of its chunk [K]. With ``kept_K``, what rounding took before, that is added to it, and
    ``sent_NK`` and ``kept_K`` become what rounding takes now: from what this process sent, and from its mean.
    """
    packed = packed_int8(sent_NK)
    received = torch.empty_like(packed)
    dist.all_to_all_single(received, packed, group=group)
    mean_K = unpacked_int8(received).mean(dim=0)
    if kept_K is not None:
        mean_K += kept_K
    packed_mean = packed_int8(mean_K.unsqueeze(0))
    gathered = packed_mean.new_empty(len(sent_NK), packed_mean.shape[1])
    dist.all_gather(list(gathered.split(1)), packed_mean, group=group)
    if kept_K is not None:
        sent_NK.sub_(unpacked_int8(packed))
        kept_K.copy_(mean_K.sub_(unpacked_int8(packed_mean)[0]))
    return unpacked_int8(gathered)


def averaged_in_bytes(
    tensors: list[torch.Tensor], processes: int, group: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """Returns the means of ``tensors`` over the ``processes`` of ``group``, rounded twice to a byte. Collective."""
    sent_NK = chunks(sum(tensor.numel() for tensor in tensors), processes, tensors[0].device)
    sizes = [tensor.numel() for tensor in tensors]
    torch.cat([tensor.flatten().float() for tensor in tensors], out=sent_NK.view(-1)[: sum(sizes)])
    means = mean_of_bytes(sent_NK, group=group).view(-1)[: sum(sizes)]
    return [mean.view(tensor.shape) for mean, tensor in zip(means.split(sizes), tensors, strict=True)]


def chunks(count: int, processes: int, device: torch.device) -> torch.Tensor:
    """Returns zeros [N, K], room for ``count`` numbers in a chunk of whole blocks for each of the processes."""
    return torch.zeros(processes, -(-count // (processes * _BLOCK)) * _BLOCK, dtype=torch.float32, device=device)


def packed_int8(values_NK: torch.Tensor) -> torch.Tensor:
    """Returns ``values_NK`` as bytes [N, K + 4 K / 256]: the rounded elements of each row, then its blocks' scales."""
    blocks = values_NK.unflatten(1, (-1, _BLOCK))
    scales = blocks.abs().amax(dim=-1) / 127
    rounded = (blocks / scales.where(scales > 0, 1).unsqueeze(-1)).round_().nan_to_num_(0).to(torch.int8)
    return torch.cat([rounded.flatten(1), scales.view(torch.int8)], dim=1)


def unpacked_int8(packed: torch.Tensor) -> torch.Tensor:
    """Returns the float32 values [N, K] that :func:`packed_int8` packed."""
    elements = packed.shape[1] * _BLOCK // (_BLOCK + 4)
    rounded, scales = packed.split([elements, packed.shape[1] - elements], dim=1)
    blocks = rounded.unflatten(1, (-1, _BLOCK)).float()
    return (blocks * scales.contiguous().view(torch.float32).unsqueeze(-1)).flatten(1)
