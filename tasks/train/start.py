"""The model that training starts from: drawn at random, or the checkpoint in ``models/init``."""

from pathlib import Path

from lm import hugging_face, low_rank
from lm.config import ModelConfig, completed
from lm.hugging_face_files import TOKENIZER
from lm.model import LanguageModel
from lm.weights import Weights, drawn, on_meta
from tasks import init, paths
from tasks.errors import BadInput, BadParameter
from tasks.shards import Manifest, digest
from tasks.train.params import TrainParams


def check(params: TrainParams, manifest: Manifest) -> Path | None:
    """Returns the folder of the checkpoint to start from, None for none, after checking all but the weights' numbers.

    Raises :class:`BadInput` where the checkpoint is damaged, not built here, or not of the shards' tokenizer, and
    :class:`BadParameter` where ``train.model`` or ``train.seq_len`` says something else than it.
    """
    folder = init.checkpoint()
    if folder is None:
        _refuse(params.misfit(None))
        return None
    init.verify(folder)
    with init.unusable_is_told(folder):
        config = hugging_face.check(folder, params.trains_mtp)
    if digest((folder / TOKENIZER).read_bytes()) != manifest.tokenizer_digest:
        raise BadInput(f"{folder / TOKENIZER}: not the tokenizer that made {paths.SHARDS}. Rerun 'shard'.")
    _refuse(params.misfit(config))
    return folder


def _refuse(told: str | None) -> None:
    if told:
        raise BadParameter(f"{paths.PARAMS}: {told}")


def begun(folder: Path | None, params: TrainParams, manifest: Manifest) -> tuple[LanguageModel, Weights]:
    """Returns a model on ``meta``, but for LoRA's factors, and its weights, to be read where they are needed.

    They are those of the checkpoint in ``folder``, which :func:`check` has passed; None: new ones, drawn by the seed.
    """
    if folder is None:
        model = on_meta(new_config(params, manifest))
        weights = drawn(model, params.seed)
    else:
        model, weights = hugging_face.opened(folder, params.trains_mtp)
        if params.lora is not None:
            low_rank.adapt(model, params.lora.targets, params.lora.rank, params.lora.alpha, params.seed)
        shorter = params.seq_len if params.seq_len < model.config.max_position_embeddings else None
        model.config = model.config.model_copy(update={"training_length": shorter})
    model.mtp_loss_weight = params.mtp_loss_weight
    return model, weights


def new_config(params: TrainParams, manifest: Manifest) -> ModelConfig:
    """Returns the chosen architecture with the tokenizer's ids and the longest position that training sees."""
    assert params.architecture is not None
    return completed(
        params.architecture,
        vocab_size=manifest.vocab_size,
        max_position_embeddings=params.seq_len,
        bos_token_id=manifest.bos_token_id,
        eos_token_id=manifest.eos_token_id,
    )
