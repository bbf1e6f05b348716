"""What a stage that ran out of GPU memory leaves behind: torch's own account, and what to turn down, in numbers."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from lm.config import GroupedConfig, GroupedMixtureConfig
from lm.distillation import Taught
from lm.feed_forward import Experts
from lm.linear import Embedding
from lm.loss import logits_held
from lm.model import LanguageModel
from tasks import atomic, paths
from tasks.errors import BadParameter
from tasks.parallel import whole
from tasks.training_params import TrainingParams
from tasks.world import PRODUCT_TYPES

_TOLD = 3
# Of allocations, with the Python lines that made them: what the last steps did.
_REMEMBERED = 100_000


@dataclasses.dataclass(frozen=True)
class Use:
    """What takes ``size`` bytes of one process, and how it becomes less."""

    what: str
    size: float
    cure: str

    def __str__(self) -> str:
        return f"{self.what} {gib(self.size)} ({self.cure})"


def remember_allocations(device: torch.device) -> None:
    """From now on a snapshot of a GPU's memory tells which lines made its latest allocations."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=_REMEMBERED, stacks="python")


def told(
    stage: str, model: LanguageModel, params: TrainingParams, length: int, precision: str
) -> contextlib.AbstractContextManager[None]:
    """As :func:`told_of`, of a training of ``model``."""
    return told_of(stage, lambda: largest(model, params, length, precision))


@contextlib.contextmanager
def told_of(stage: str, held: Callable[[], list[Use]]) -> Iterator[None]:
    """Turns torch's OutOfMemoryError into a :class:`BadParameter` that names the first of ``held`` to turn down.

    On a GPU torch's summary and a snapshot with the latest allocations are written first.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        written = _write_account(stage)
        first = str(error).partition(". ")[0]
        uses = "; ".join(str(use) for use in held()[:_TOLD])
        raise BadParameter(
            f"{paths.PARAMS}: {stage}: out of GPU memory ({first}). The largest, as estimated for each process: {uses}."
            f"{written}"
        ) from None


def largest(model: LanguageModel, params: TrainingParams, length: int, precision: str) -> list[Use]:
    """Returns what this process holds, the largest first.

    Estimates from the shapes: a product keeps its input and its output in the precision's type, a norm fp32.
    """
    return sorted(
        [
            _weights(model, params),
            _optimizer(model, params),
            _activations(model, params, length, precision),
            _logits(model, params, length, precision),
            *_teacher(model),
        ],
        key=lambda use: -use.size,
    )


def _weights(model: LanguageModel, params: TrainingParams) -> Use:
    size = _with_gradients(list(model.parameters()), params)
    experts = (module for module in model.modules() if isinstance(module, Experts))
    routed = _with_gradients([parameter for module in experts for parameter in module.parameters()], params)
    cures = [f"{gib(routed)} of it routed experts"] if routed else []
    cures.append(f"lower {where_the_model_is(model, routed > 0)}")
    return Use("weights and their gradients", size, "; ".join([*cures, *_more_shards(params, size)]))


def _with_gradients(parameters: list[nn.Parameter], params: TrainingParams) -> int:
    # Of those that LoRA leaves as they are, there is no gradient.
    return 4 * _held(parameters, params) + 4 * _held(filter(_is_trained, parameters), params)


def _is_trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _held(parameters: Iterable[nn.Parameter], params: TrainingParams) -> int:
    """Returns how many numbers this process has of ``parameters``."""
    found = list(parameters)
    size = sum(whole.local(parameter).numel() for parameter in found)
    if any(parameter.is_meta for parameter in found):
        # They are being laid out.
        return size // (math.prod(params.layout.sizes) // params.layout.replicate)
    return size


def _more_shards(params: TrainingParams, size: float) -> list[str]:
    # Without replicas to take them from it would need more processes.
    if params.layout.replicate % 2:
        return []
    return [f"mesh.shard: {2 * params.layout.shard} makes it {gib(size / 2)}"]


def where_the_model_is(model: LanguageModel, has_experts: bool) -> str:
    """Names the parameters that make ``model`` as large as it is."""
    experts = "num_experts" if isinstance(model.config, GroupedMixtureConfig) else "n_routed_experts"
    names = ["hidden_size", "num_hidden_layers", *([experts] if has_experts else [])]
    return "train.model's " + ", ".join(names[:-1]) + f" or {names[-1]}"


def _optimizer(model: LanguageModel, params: TrainingParams) -> Use:
    weights = _held(filter(_is_trained, model.parameters()), params)
    ends = [module for module in model.modules() if isinstance(module, Embedding) or module is model.lm_head]
    # Tied ones are one; a pipeline's stage has one of them, or none.
    outside = _held(filter(_is_trained, {weight for end in ends for weight in end.parameters()}), params)
    muon = 8 * outside + 4 * (weights - outside)
    size, cure = 8 * weights, f"optimizer: muon makes it {gib(muon)}"
    if params.optimizer == "muon":
        size, cure = muon, "goes with the weights"
    if not all(map(_is_trained, model.parameters())):
        cure = "lower lora.rank"
    return Use("state of the optimizer", size, ", ".join([cure, *_more_shards(params, size)]))


def _activations(model: LanguageModel, params: TrainingParams, length: int, precision: str) -> Use:
    now = activation_bytes(model, params.micro_batch * length, params.activation_checkpointing, precision)
    full = activation_bytes(model, params.micro_batch * length, "full", precision)
    cures = []
    if params.activation_checkpointing != "full":
        cures.append(f"activation_checkpointing: full makes it {gib(full)}")
    return Use("activations", now, ", ".join([*cures, _fewer_windows(params, now)]))


def activation_bytes(model: LanguageModel, tokens: int, checkpointing: str, precision: str) -> float:
    """Estimates what the layers keep for the backward pass of ``tokens`` tokens."""
    product = PRODUCT_TYPES[precision].itemsize
    layers = []
    for layer in model.blocks():
        wide, narrow = 0.0, 0.0
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                wide += 4 * parameter.numel()
                continue
            outputs, inputs = parameter.shape[-2:]
            times = _experts_a_token(model) if parameter.dim() == 3 else 1
            wide += product * times * (outputs + inputs)
            narrow += product * times * outputs
        layers.append((wide, narrow))
    entry = 4 * model.config.hidden_size
    if checkpointing == "none":
        return tokens * sum(wide for wide, _ in layers)
    # While a layer is computed again, all of its own is there once.
    again = max(wide for wide, _ in layers)
    if checkpointing == "full":
        return tokens * (len(layers) * entry + again)
    return tokens * (sum(entry + narrow for _, narrow in layers) + again)


def _logits(model: LanguageModel, params: TrainingParams, length: int, precision: str) -> Use:
    # Themselves and their gradient; in fp32 themselves, their softmax and its gradient.
    bytes_each = 2 * PRODUCT_TYPES[precision].itemsize + 12
    of_a_window, most = length * model.config.vocab_size, logits_held(params.device)
    size = min(params.micro_batch * of_a_window, most) * bytes_each
    if of_a_window >= most:
        return Use("logits", size, "whatever micro_batch is")
    return Use("logits", size, _fewer_windows(params, params.micro_batch * of_a_window * bytes_each, size))


def _teacher(model: LanguageModel) -> list[Use]:
    if not isinstance(model.taught, Taught):
        return []
    size = 4 * sum(parameter.numel() for parameter in model.taught.teacher.parameters())
    return [Use("the float model that teaches", size, "objective: text needs none")]


def _fewer_windows(params: TrainingParams, size: float, most: float = math.inf) -> str:
    """Names the next micro_batch at which that which takes ``size`` now is less than ``most``."""
    if params.micro_batch == 1:
        return "lower train.seq_len"
    sizes = {few: size * few / params.micro_batch for few in range(params.micro_batch - 1, 0, -1)}
    fewer = next(few for few, less in sizes.items() if params.micro_batch % few == 0 and less < most)
    return f"micro_batch: {fewer} makes it {gib(sizes[fewer])}"


def _experts_a_token(model: LanguageModel) -> int:
    return 0 if isinstance(model.config, GroupedConfig) else model.config.num_experts_per_tok


def _write_account(stage: str) -> str:
    """Writes torch's summary and snapshot; returns the sentence that says where."""
    if not torch.cuda.is_initialized():
        return ""
    # Several processes may run out at once.
    rank = os.environ.get("RANK", "0")
    summary = paths.MEASUREMENTS / f"{stage}-memory-{rank}.txt"
    snapshot = paths.MEASUREMENTS / f"{stage}-memory-{rank}.pickle"
    atomic.write_text(summary, torch.cuda.memory_summary())
    torch.cuda.memory._dump_snapshot(str(snapshot))
    return f" torch's account: {summary}, and {snapshot} for https://pytorch.org/memory_viz."


def gib(size: float) -> str:
    """Returns ``size``, in bytes, for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
