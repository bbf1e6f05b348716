"""``models/evaluation.json``: what was measured, with 95% intervals, and whether the model passes the gate."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from tasks.bootstrap import Bootstrap, Estimate
from tasks.evaluate.score import Scores


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True)


class FloatResult(_Report):
    """The float model on the test split."""

    bits_per_byte: Estimate
    nats_per_token: Estimate
    accuracy: Estimate


class Int8Result(FloatResult):
    """The INT8 model on the test split; divergence and agreement are against the float model."""

    kl_divergence: Estimate
    same_top_1: Estimate


class Models(_Report):
    float: FloatResult
    int8: Int8Result


class NGramResult(_Report):
    order: int
    bits_per_byte: Estimate


class Point(_Report):
    """A number without an interval: compression is measured once, over the whole text."""

    value: float


class XzResult(_Report):
    bits_per_byte: Point


class Baselines(_Report):
    trained_on_bytes: int
    ngram: NGramResult
    xz: XzResult


class ChampionResult(_Report):
    """The promoted INT8 model on the same text, and how the candidate's INT8 model compares with it.

    ``relative_loss`` is the candidate's loss over the champion's, minus 1, paired by document. ``same_split``: text
    was dealt out to train and test as it is now when the champion was made, so that it was not trained on this text.
    """

    version: str
    bits_per_byte: Estimate
    relative_loss: Estimate
    same_split: bool


CheckName = Literal["int8_against_float", "against_champion", "bits_per_byte"]


class Check(_Report):
    """One check of the gate, its ``reason`` one line; without numbers where there was nothing to compare."""

    name: CheckName
    passed: bool
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    reason: str


class Gate(_Report):
    """Passed when every check is. ``relative_loss`` and ``limit`` are those of INT8 against float."""

    passed: bool
    relative_loss: Estimate
    limit: float
    checks: tuple[Check, ...]


class Evaluation(_Report):
    documents: int
    tokens: int
    bytes: int
    context: int
    models: Models
    baselines: Baselines
    champion: ChampionResult | None
    gate: Gate


def models(scores: Scores, bootstrap: Bootstrap) -> Models:
    """Returns the results of both models; bits per byte are nats / (ln 2 x bytes)."""
    tokens, size = scores.column("tokens"), scores.column("bytes")

    def common(kind: str) -> dict[str, Estimate]:
        nats = scores.column(f"nats_{kind}")
        return {
            "bits_per_byte": bootstrap.ratio(nats, size, 1 / math.log(2)),
            "nats_per_token": bootstrap.ratio(nats, tokens),
            "accuracy": bootstrap.ratio(scores.column(f"right_{kind}"), tokens),
        }

    return Models(
        float=FloatResult(**common("float")),
        int8=Int8Result(
            **common("int8"),
            kl_divergence=bootstrap.ratio(scores.column("kl"), tokens),
            same_top_1=bootstrap.ratio(scores.column("same_top"), tokens),
        ),
    )


def champion(
    version: str, nats: npt.NDArray[np.float64], scores: Scores, bootstrap: Bootstrap, same_split: bool
) -> ChampionResult:
    """Returns the result of the champion, which costs ``nats`` [documents] on the documents of ``scores``."""
    return ChampionResult(
        version=version,
        bits_per_byte=bootstrap.ratio(nats, scores.column("bytes"), 1 / math.log(2)),
        relative_loss=bootstrap.ratio(scores.column("nats_int8") - nats, nats),
        same_split=same_split,
    )


def relative_loss(scores: Scores, bootstrap: Bootstrap) -> Estimate:
    """Returns INT8's loss over float's, minus 1, paired by document."""
    float_nats = scores.column("nats_float")
    return bootstrap.ratio(scores.column("nats_int8") - float_nats, float_nats)
