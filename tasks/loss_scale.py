"""The factor that lifts gradients over what fp16 rounds to zero (arXiv 1710.03740, section 3.2).

It moves by the numbers of torch.amp.GradScaler. That one looks for overflows in the gradients of its own process; the
training loop has all processes agree on them anyway, and so the factors stay equal.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tasks.parallel import whole

_FIRST = 2.0**16
_STEPS_UNTIL_DOUBLED = 2000


class LossScale:
    """The factor of the next step's loss: a power of two in fp16, else always 1."""

    def __init__(self, precision: str) -> None:
        self._moves = precision == "fp16"
        self.value = _FIRST if self._moves else 1.0
        self.overflows = 0
        """How many steps were left out because their gradients were too large for fp16."""
        self._since_moved = 0

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes the factor out of the gradients of ``parameters``, in place; exact, but for what is not finite."""
        if self.value == 1.0:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                whole.local(parameter.grad).mul_(1 / self.value)

    def halve(self) -> bool:
        """Halves the factor after a gradient that is not finite; False where that is not the factor's fault."""
        if self.value <= 1.0:
            return False
        self.value /= 2
        self.overflows += 1
        self._since_moved = 0
        return True

    def keep(self) -> None:
        """Counts a step that was taken; many in a row double the factor."""
        if self._moves:
            self._since_moved += 1
            if self._since_moved == _STEPS_UNTIL_DOUBLED:
                self.value *= 2
                self._since_moved = 0

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "since_moved": self._since_moved, "overflows": self.overflows}

    def load_state(self, state: dict[str, Any]) -> None:
        self.value, self._since_moved, self.overflows = state["value"], state["since_moved"], state["overflows"]
