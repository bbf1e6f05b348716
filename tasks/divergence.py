"""What is told of a training that came to numbers that are not finite: where, and what to turn down."""

from tasks import paths
from tasks.errors import BadInput, BadParameter
from tasks.training_params import TrainingParams


def no_step(stage: str, params: TrainingParams, precision: str, halved: int) -> BadParameter:
    """No step's gradient was finite, though the loss's factor was ``halved`` so often."""
    return BadParameter(
        f"{paths.PARAMS}: {stage}: no step could be taken: at none of {params.steps:,} was the gradient finite in "
        f"{precision}, though the loss's factor was halved {halved:,} times. Set precision: bf16 or fp32, or raise "
        "steps."
    )


def too_many_skipped(params: TrainingParams, where: str, in_a_row: int) -> BadParameter:
    """The gradient was not finite ``where``, and so often without a break before."""
    return BadParameter(
        f"{paths.PARAMS}: the gradient is not finite at {where}, step {in_a_row} of a row. Halve learning_rate (now "
        f"{params.learning_rate:g}), lengthen warmup_fraction, or look at that text; with max_skipped_steps raised it "
        "goes on."
    )


def diverged(stage: str, params: TrainingParams, precision: str, loss: float, step: int) -> BadParameter:
    """The validation ``loss`` is not finite after ``step`` steps."""
    rates = f"learning_rate (now {params.learning_rate:g})"
    if params.optimizer == "muon":
        rates += f" and muon_learning_rate (now {params.muon_learning_rate:g})"
    more = _of(precision)
    cures = f"{rates}, lengthen warmup_fraction{more}" if more else f"{rates} or lengthen warmup_fraction"
    return BadParameter(
        f"{paths.PARAMS}: {stage}: the validation loss is not finite ({loss}) after step {step:,} of {params.steps:,}: "
        f"the training has diverged. Halve {cures}."
    )


def starts_diverged(stage: str, precision: str, loss: float) -> BadInput:
    """The validation ``loss`` of the weights to begin with is not finite."""
    return BadInput(
        f"{paths.INIT}: the validation loss of its weights is not finite ({loss}), before the first step. Start from "
        f"another checkpoint ({stage}.init){_of(precision, f'{stage}.')}."
    )


def _of(precision: str, section: str = "") -> str:
    # Of bf16 the range is that of fp32.
    return f", or set {section}precision: bf16 or fp32 (now fp16)" if precision == "fp16" else ""
