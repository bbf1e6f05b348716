"""What a training process takes, told to a test."""

from collections.abc import Callable
from typing import Any


def on_each_step(tell: Callable[[Any, list[Any]], None]) -> None:
    """Calls ``tell(run, [step, windows])`` after each step, with this process's windows of it."""
    from tasks import trainer

    step, batch_of_rank = trainer.Trainer.step, trainer.batch_of_rank
    last: list[Any] = []

    def remembered(*arguments: Any) -> Any:
        batch = batch_of_rank(*arguments)
        last[:] = [arguments[0], batch.flatten().tolist()]
        return batch

    def told(self: trainer.Trainer, *arguments: Any) -> Any:
        report = step(self, *arguments)
        tell(self, last)
        return report

    trainer.batch_of_rank, trainer.Trainer.step = remembered, told  # type: ignore[method-assign]
