"""``models/evaluation.json``: what was measured, with 95% intervals, and whether INT8 passes the gate."""

import math

from pydantic import BaseModel, ConfigDict

from tasks.evaluate.bootstrap import Bootstrap, Estimate
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


class Gate(_Report):
    """INT8's loss over float's, minus 1, on the same documents; passed when its upper end is under ``limit``."""

    relative_loss: Estimate
    limit: float
    passed: bool


class Evaluation(_Report):
    documents: int
    tokens: int
    bytes: int
    context: int
    models: Models
    baselines: Baselines
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


def gate(scores: Scores, bootstrap: Bootstrap, limit: float) -> Gate:
    """Returns the verdict on INT8: its relative loss, paired by document, against ``limit``."""
    float_nats = scores.column("nats_float")
    loss = bootstrap.ratio(scores.column("nats_int8") - float_nats, float_nats)
    return Gate(relative_loss=loss, limit=limit, passed=loss.high < limit)
