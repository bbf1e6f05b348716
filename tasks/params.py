"""The whole of ``params.yaml``, for whoever checks it before anything runs. A stage alone reads its own section."""

import importlib.metadata
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from tokenizers import Tokenizer

from lm.config import without_further
from lm.hugging_face_config import architecture_of
from lm.hugging_face_files import TOKENIZER, read_config
from lm.tokenizer import read_tokenizer, size_of
from tasks import init, paths
from tasks.card.params import CardParams
from tasks.errors import BadInput, BadParameter
from tasks.evaluate.params import EvaluateParams
from tasks.ingest.params import IngestParams
from tasks.notice_params import NoticeParams
from tasks.publish_params import PublishParams
from tasks.quantize.params import QuantizeParams
from tasks.section import Section, parse_yaml, read_yaml, validate
from tasks.shard.checkpoint_tokenizer import misfit_of
from tasks.shard.params import ShardParams
from tasks.sources import CollectParams
from tasks.train.params import TrainParams


class FlowParams(Section):
    """How the flow treats the stages. No part of a version's identity."""

    # Retries of a stage after a fault that may pass (a killed worker, a held lock, a lost connection).
    retries: dict[str, Annotated[int, Field(ge=0)]] = {}
    retry_delay_seconds: float = Field(ge=0)
    # A scheduled night that would start later than this after its time (an outage) is skipped with a note.
    skip_when_late_minutes: float = Field(default=120, gt=0)


class Params(Section):
    """``params.yaml``, whole."""

    collect: CollectParams
    ingest: IngestParams
    shard: ShardParams
    train: TrainParams
    quantize: QuantizeParams
    evaluate: EvaluateParams
    card: CardParams
    flow: FlowParams
    notice: NoticeParams = NoticeParams()
    publish: PublishParams = PublishParams()

    @model_validator(mode="after")
    def _a_later_stage_fits_an_earlier_one(self) -> Self:
        # What a stage would only find when those before it have had their hours. Of a checkpoint nobody knows it here.
        if self.shard.vocab_size is None and self.train.init == init.SCRATCH:
            raise ValueError(
                "shard.vocab_size is null, and train.init: scratch brings no tokenizer. Set the size of the one to "
                "train, or name a checkpoint in train.init."
            )
        if self.train.model is not None and (told := self.quantize.misfit(self.train.model)):
            raise ValueError(told)
        return self

    def check_start(self, folder: Path) -> None:
        """Raises :class:`tasks.errors.UserMistake` for what `train` and `quantize` could not do with what is there.

        That is the torch that is installed, and the checkpoint in ``folder`` that training starts from, if there is
        one: what those stages would only find when the ones before them have had their hours. Reads no weights.
        """
        if told := self._unbuilt() or self._misfit(folder):
            raise BadParameter(f"{paths.PARAMS}: {told}")

    def _misfit(self, folder: Path) -> str | None:
        record = init.read(folder)
        if record.init != self.train.init:
            # Of another run; the stages know more of that.
            return None
        if not record.files:
            return self.train.misfit(None) or self.shard.misfit(None)
        with init.unusable_is_told(folder):
            config = read_config(folder)
        # Whether the layers that predict further tokens are in the files, as the configuration says, `train` sees.
        told = self.train.misfit(config) if self.train.misfit(without_further(config)) else None
        told = told or self.quantize.misfit(architecture_of(config))
        tokenizer = _tokenizer_in(folder)
        if told or tokenizer is None:
            return told
        if other := misfit_of(tokenizer, config):
            raise BadInput(f"{folder / TOKENIZER}: {other}")
        return self.shard.misfit(size_of(tokenizer))

    def _unbuilt(self) -> str | None:
        build = importlib.metadata.version("torch")
        for section, params in (("train", self.train), ("quantize", self.quantize)):
            if params.device == "cuda" and build.endswith("+cpu"):
                return (
                    f"{section}.device is cuda, and torch {build}, which is installed, is built for CPUs alone. Set "
                    "device: cpu, or install a CUDA build (see README.md)."
                )
        return None


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    try:
        return read_tokenizer(folder / TOKENIZER)
    except Exception:
        # `shard` says what is wrong with it; tokenizers has no exception of its own.
        return None


def read(path: Path = paths.PARAMS) -> Params:
    """Returns the whole file. Raises :class:`tasks.errors.BadParameter` that names every wrong key."""
    return validate(Params, read_yaml(path), path)


def parse(content: bytes, path: Path) -> Params:
    """Returns the whole file ``path``, which holds ``content`` somewhere else. Raises as :func:`read` does."""
    return validate(Params, parse_yaml(content, path), path)
