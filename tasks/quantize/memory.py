"""What quantizing holds in a GPU's memory while nothing is trained, for the line that tells that it was too little."""

from lm.feed_forward import Experts
from lm.model import LanguageModel
from tasks.out_of_memory import Use, gib, where_the_model_is


def largest(model: LanguageModel, length: int, count: int, compensated: bool) -> list[Use]:
    """Returns what a process holds of the float ``model``, the largest first, by the shapes; all of it is fp32.

    There are ``count`` calibration windows of ``length`` tokens; ``compensated`` says what they are for.
    """
    # Compensation takes all windows through one block after the other; ranges are found window by window.
    held = [_weights(model), _windows(model, length, count if compensated else 1)]
    if compensated:
        held.append(_moments(model))
    return sorted(held, key=lambda use: -use.size)


def _weights(model: LanguageModel) -> Use:
    has_experts = any(isinstance(module, Experts) for module in model.modules())
    size = 2 * 4 * sum(parameter.numel() for parameter in model.parameters())
    return Use("weights, in float and rounded", size, f"lower {where_the_model_is(model, has_experts)}")


def _windows(model: LanguageModel, length: int, count: int) -> Use:
    # At the head: what goes into it, and the logits of one window, which come out.
    states, logits = 4 * length * model.config.hidden_size, 4 * length * model.config.vocab_size
    if count == 1:
        return Use("a calibration window", states + logits, "lower train.seq_len")
    fewer = count // 2
    cure = f"calibration_windows: {fewer} makes it {gib(fewer * states + logits)}, or lower train.seq_len"
    return Use("calibration windows", count * states + logits, cure)


def _moments(model: LanguageModel) -> Use:
    """The second moments of what a block's weights are multiplied by, inputs x inputs in fp64 for each."""
    size = max(
        sum(8 * weight[..., 0, :].numel() * weight.shape[-1] for weight in block.parameters() if weight.dim() > 1)
        for block in model.blocks()
    )
    return Use("what compensation knows of a block's inputs", size, "compensate: false needs none")
