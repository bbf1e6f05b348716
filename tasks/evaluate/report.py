"""``models/evaluation.json``: what was measured, with 95% intervals, and whether the model passes the gate."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from tasks.bootstrap import SHARE, Bootstrap, Estimate
from tasks.evaluate.score import Marks, Quantized, Scores

# The quantized models that are scored.
INT8, POST_TRAINING, ROUNDED = "int8", "post_training", "rounded"


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True)


class FloatResult(_Report):
    """The float model on the test split."""

    bits_per_byte: Estimate
    nats_per_token: Estimate
    accuracy: Estimate


class SameExperts(_Report):
    """The share of tokens that a layer's router gives to the same set of experts as in the float model."""

    layer: int
    share: Estimate


class Int8Result(FloatResult):
    """A quantized model on the test split, compared with the float model; divergence in nats a token.

    ``same_experts`` is read from the graph that ran; it has no entry where the model has no routed experts.
    """

    relative_loss: Estimate
    kl_divergence: Estimate
    kl_divergence_99: Estimate
    same_top_1: Estimate
    same_experts: tuple[SameExperts, ...]


class Models(_Report):
    """The float model and what is made of it, step by step; a step is None where INT8 is just that.

    ``rounded``: float under INT8's roundings, and nothing else. ``post_training``: rotated and compensated before them
    as ``quantize`` was asked to, which is what fine-tuning began with.
    """

    float: FloatResult
    rounded: Int8Result | None
    post_training: Int8Result | None
    int8: Int8Result


class NGramResult(_Report):
    """An interpolated model of so many characters at a time, trained on the training split."""

    order: int
    bits_per_byte: Estimate


class Point(_Report):
    """A number without an interval: compression is measured once, over the whole text."""

    value: float


class XzResult(_Report):
    """`xz -9` over the test text, behind the training split."""

    bits_per_byte: Point


class Baselines(_Report):
    """What a model has to beat. Both have read the last ``trained_on_bytes`` of the training split."""

    trained_on_bytes: int
    ngram: NGramResult
    xz: XzResult


class ChampionResult(_Report):
    """The promoted INT8 model on the same text, and how the candidate's INT8 model compares with it.

    ``relative_loss`` is the candidate's loss over the champion's, minus 1, paired by document. ``same_split``: text
    was dealt out to train and test as it is now when the champion was made; see
    :meth:`tasks.champion.Split.deals_like` for what of it the champion may have been trained on all the same.
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
    """``models/evaluation.json``: how much was measured, in what context (tokens), and what came of it."""

    documents: int
    documents_in_split: int
    tokens: int
    bytes: int
    context: int
    models: Models
    baselines: Baselines
    champion: ChampionResult | None
    gate: Gate


def models(scores: Scores, bootstrap: Bootstrap, layers: tuple[int, ...]) -> Models:
    """Returns the results of all models; bits per byte are nats / (ln 2 x bytes). ``layers`` have routed experts."""
    found = {name: _quantized(scores, marks, bootstrap, layers) for name, marks in scores.quantized.items()}
    post_training = found.get(POST_TRAINING)
    return Models(
        float=FloatResult(**_common(scores, scores.float, bootstrap)),
        # Where nothing is rotated or compensated, fine-tuning begins with what is only rounded.
        rounded=found.get(ROUNDED, post_training),
        post_training=post_training,
        int8=found[INT8],
    )


def _common(scores: Scores, marks: Marks, bootstrap: Bootstrap) -> dict[str, Estimate]:
    return {
        "bits_per_byte": bootstrap.ratio(marks.nats, scores.bytes, 1 / math.log(2)),
        "nats_per_token": bootstrap.ratio(marks.nats, scores.tokens),
        "accuracy": bootstrap.ratio(marks.right, scores.tokens, within=SHARE),
    }


def _quantized(scores: Scores, marks: Quantized, bootstrap: Bootstrap, layers: tuple[int, ...]) -> Int8Result:
    return Int8Result(
        **_common(scores, marks, bootstrap),
        # Paired by document.
        relative_loss=bootstrap.ratio(marks.nats - scores.float.nats, scores.float.nats),
        kl_divergence=bootstrap.ratio(np.array([one.sum() for one in marks.divergence]), scores.tokens),
        kl_divergence_99=bootstrap.quantile(marks.divergence, 0.99),
        same_top_1=bootstrap.ratio(marks.same_top, scores.tokens, within=SHARE),
        same_experts=tuple(
            SameExperts(layer=layer, share=bootstrap.ratio(same, scores.tokens, within=SHARE))
            for layer, same in zip(layers, marks.same_experts.T, strict=True)
        ),
    )


def champion(
    version: str, nats: npt.NDArray[np.float64], scores: Scores, bootstrap: Bootstrap, same_split: bool
) -> ChampionResult:
    """Returns the result of the champion, which costs ``nats`` [documents] on the documents of ``scores``."""
    return ChampionResult(
        version=version,
        bits_per_byte=bootstrap.ratio(nats, scores.bytes, 1 / math.log(2)),
        relative_loss=bootstrap.ratio(scores.quantized[INT8].nats - nats, nats),
        same_split=same_split,
    )
