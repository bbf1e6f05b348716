"""The whole of ``params.yaml``, for whoever checks it before anything runs. A stage alone reads its own section."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tasks import paths
from tasks.card.params import CardParams
from tasks.evaluate.params import EvaluateParams
from tasks.ingest.params import IngestParams
from tasks.notice_params import NoticeParams
from tasks.publish_params import PublishParams
from tasks.quantize.params import QuantizeParams
from tasks.section import Section, parse_yaml, read_yaml, validate
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


def read(path: Path = paths.PARAMS) -> Params:
    """Returns the whole file. Raises :class:`tasks.errors.BadParameter` that names every wrong key."""
    return validate(Params, read_yaml(path), path)


def parse(content: bytes, path: Path) -> Params:
    """Returns the whole file ``path``, which holds ``content`` somewhere else. Raises as :func:`read` does."""
    return validate(Params, parse_yaml(content, path), path)
