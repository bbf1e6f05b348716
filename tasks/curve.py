"""How a training got on: what was recorded at every validation, and which steps were left out."""

from dataclasses import dataclass, field

COLUMNS = ("step", "learning_rate", "train_loss", "valid_loss", "grad_norm", "expert_imbalance")


@dataclass
class Curve:
    """What is recorded at every validation: one row of ``COLUMNS`` each, losses in nats a token.

    ``expert_imbalance`` is the busiest expert's tokens over the mean expert's since the last row, averaged over layers;
    1 is perfect balance. ``skipped`` are the steps, counted from 1, whose loss or gradient was not finite;
    ``overflows`` is how many more were left out because fp16 could not hold their gradients.
    """

    rows: list[tuple[float, ...]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    overflows: int = 0
    # The validation loss before the first step, where that was asked for.
    before: float | None = None
    # How many processes there were, one number for each stretch of steps with another number than before.
    processes: list[int] = field(default_factory=list)

    def to_csv(self) -> str:
        lines = [",".join(COLUMNS), *(",".join(f"{value:.6g}" for value in row) for row in self.rows)]
        return "\n".join(lines) + "\n"

    def last(self, column: str) -> float:
        return self.rows[-1][COLUMNS.index(column)]

    def skipped_in_a_row(self) -> int:
        """Returns how many steps were skipped without a break up to the last one that was."""
        count = 0
        while count < len(self.skipped) and self.skipped[-1 - count] == self.skipped[-1] - count:
            count += 1
        return count
