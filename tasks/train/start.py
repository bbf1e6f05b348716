"""The model that training starts from: drawn at random, or the checkpoint in ``models/init``."""

from pathlib import Path

from lm import hugging_face, low_rank
from lm.config import LatentConfig, ModelConfig, completed
from lm.hugging_face_config import architecture_of
from lm.hugging_face_files import TOKENIZER
from lm.model import LanguageModel
from lm.weights import Weights, drawn, on_meta
from tasks import init, paths
from tasks.errors import BadInput, BadParameter
from tasks.mesh import check_fits
from tasks.shards import Manifest, digest
from tasks.train.params import LoraParams, TrainParams, check_depths

_MOST_NAMED = 4
_DO = "Name another checkpoint in train.init, or mend that one."


def check(params: TrainParams, manifest: Manifest) -> Path | None:
    """Returns the folder of the checkpoint to start from, None for none, after checking all but the weights' numbers.

    Raises :class:`BadInput` where the checkpoint is damaged, not built here, or not of the shards' tokenizer, and
    :class:`BadParameter` where ``train.model`` or ``train.seq_len`` says something else than it.
    """
    folder = init.checkpoint()
    if folder is None:
        if params.model is None:
            raise BadParameter(
                f"{paths.PARAMS}: train.model is null, and no version is promoted yet that training could start from. "
                "Describe a model, or name a checkpoint in train.init."
            )
        if params.lora is not None:
            raise BadParameter(
                f"{paths.PARAMS}: train.lora adapts a model that is there, and no version is promoted yet. Set lora: "
                "null until one is, or name a checkpoint in train.init."
            )
        return None
    init.verify(folder)
    with init.unusable_is_told(folder, _DO):
        config = hugging_face.check(folder, params.trains_mtp)
    if digest((folder / TOKENIZER).read_bytes()) != manifest.tokenizer_digest:
        raise BadInput(f"{folder / TOKENIZER}: not the tokenizer that made {paths.SHARDS}. Rerun 'shard'.")
    if params.model is not None:
        _check_model(params, config)
    try:
        check_fits(params.mesh.over(params.world_size), architecture_of(config))
        if isinstance(config, LatentConfig):
            check_depths(config, params.seq_len)
    except ValueError as error:
        raise BadParameter(f"{paths.PARAMS}: train: {error}.") from None
    if params.seq_len > config.max_position_embeddings:
        raise BadParameter(
            f"{paths.PARAMS}: train.seq_len {params.seq_len} is more than the {config.max_position_embeddings} "
            "positions of the model that train.init names. Lower it to that."
        )
    if params.lora is not None:
        _check_lora(params.lora, params.bias_update_rate, config)
    return folder


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


def _check_lora(lora: LoraParams, bias_update_rate: float, config: ModelConfig) -> None:
    try:
        low_rank.chosen(low_rank.adaptable(config), lora.targets)
    except ValueError as error:
        raise BadParameter(f"{paths.PARAMS}: train.lora.targets: {error}.") from None
    if isinstance(config, LatentConfig) and config.has_bias and bias_update_rate:
        raise BadParameter(
            f"{paths.PARAMS}: train.bias_update_rate is {bias_update_rate:g}, and train.lora leaves all but its "
            "factors as they are, the routers' biases too. Set bias_update_rate: 0.0."
        )


def _check_model(params: TrainParams, config: ModelConfig) -> None:
    asked, there = params.architecture.model_dump() if params.architecture else {}, architecture_of(config).model_dump()
    other = sorted(name for name in asked.keys() | there.keys() if asked.get(name) != there.get(name))
    if other:
        # Of another family all else is other too.
        named = ["model_type"] if "model_type" in other else other[:_MOST_NAMED]
        told = ", ".join(f"{name} {_told(asked.get(name))} (there {_told(there.get(name))})" for name in named)
        raise BadParameter(
            f"{paths.PARAMS}: train.model is not the model that train.init names: {told}. Set model: null to take that "
            "one, or init: scratch to train this one."
        )


def _told(value: object) -> object:
    return "null" if value is None else value
