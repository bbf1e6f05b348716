"""Scores of the float model and of quantized graphs on the same documents, and the loss of a champion."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.runtime import Generator
from tasks.evaluate.routing import FloatRouting, Ids, Int8Routing
from tasks.progress import Progress
from tasks.shards import Tokens

WINDOWS_AT_ONCE = 8
# 64 MiB of fp32, of which a thread holds about five at a time: of eight windows of 2,048 tokens and a vocabulary of
# 150,000 they would be 10 GB each. Where that is too little for one window, it is read piece by piece, as a text is.
LOGITS_AT_ONCE = 2**24
Sums = npt.NDArray[np.float64]
Learned = npt.NDArray[np.bool_]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Window:
    """``inputs`` of one forward pass; ``targets[i]`` follows ``inputs[i]`` and counts where ``i`` is in ``scored``."""

    document: int
    inputs: Ids
    targets: Ids
    scored: Ids


@dataclass(frozen=True)
class Marks:
    """What a model makes of each document, special tokens left out: nats, and how many likeliest tokens are right."""

    nats: Sums
    right: Sums


@dataclass(frozen=True)
class Quantized(Marks):
    """And how a quantized model compares with float on each: ``divergence`` is that of each of its tokens, in nats.

    ``same_top`` counts the tokens with the same likeliest follower, ``same_experts`` [documents, layers with experts]
    those that a layer's router gave to the same set of experts.
    """

    divergence: list[Sums]
    same_top: Sums
    same_experts: Sums


@dataclass(frozen=True)
class Scores:
    """Over the documents, special tokens left out: how large each is, and what the models make of it."""

    tokens: Sums
    bytes: Sums
    float: Marks
    quantized: Mapping[str, Quantized] = field(default_factory=dict)


def windows_of(document: int, tokens: Ids, context: int, learned: Learned | None = None) -> Iterator[Window]:
    """Yields the windows that score each token of ``tokens`` but the first (BOS) exactly once.

    Where ``learned`` [tokens] is given, of these only the tokens that it names: a conversation's answers.

    A document longer than ``context`` is walked in half windows: from the second window on, every scored token sees at
    least half a context before it.
    """
    scored, start = 1, 0
    while scored < len(tokens):
        end = min(start + context, len(tokens) - 1)
        new = np.arange(scored - start - 1, end - start)
        if learned is not None:
            new = new[learned[start + 1 + new]]
        yield Window(document, tokens[start:end], tokens[start + 1 : end + 1], new)
        scored = end + 1
        start = max(start + 1, scored - 1 - context // 2)


def score(
    model: LanguageModel,
    quantized: Mapping[str, Int8Routing],
    documents: list[tuple[Tokens, int]],
    threads: int,
    progress: Progress,
    learned: list[Learned] | None = None,
) -> Scores:
    """Returns the scores of all models on ``documents`` (tokens with BOS first, UTF-8 bytes). All compute in fp32.

    ``learned`` says of each document which tokens count; without it all do but the first.
    """
    ids = [tokens.astype(np.int64) for tokens, _ in documents]
    model.eval()
    progress.begin("scoring")
    routed = FloatRouting(model)
    score_batch = partial(_score_batch, routed, quantized, model.config.eos_token_id)
    found = _by_window(score_batch, ids, model.config, threads, progress, learned)
    # [documents, numbers] of each model, and the divergences of a document's windows one after the other.
    sums = {name: _summed(len(ids), [(window, sides[name][0]) for window, sides in found]) for name in ("", *quantized)}
    divergence: dict[str, list[list[Sums]]] = {name: [[] for _ in ids] for name in quantized}
    for window, sides in found:
        for name in quantized:
            divergence[name][window.document].append(sides[name][1])
    return Scores(
        tokens=np.array(
            [len(tokens) - 1 for tokens in ids] if learned is None else [mask[1:].sum() for mask in learned],
            dtype=np.float64,
        ),
        bytes=np.array([size for _, size in documents], dtype=np.float64),
        float=Marks(*sums[""].T),
        quantized={
            name: Quantized(
                nats=sums[name][:, 0],
                right=sums[name][:, 1],
                divergence=[np.concatenate(parts) if parts else np.zeros(0) for parts in divergence[name]],
                same_top=sums[name][:, 2],
                same_experts=sums[name][:, 3:],
            )
            for name in quantized
        },
    )


def nats_of(
    int8: Generator, documents: list[Ids], threads: int, progress: Progress, learned: list[Learned] | None = None
) -> Sums:
    """Returns the loss of an INT8 model on each of ``documents`` (its own tokens, BOS first), in nats: [documents].

    ``learned`` is as in :func:`score`.
    """
    progress.begin("champion")
    padding = int(documents[0][0])
    found = _by_window(partial(_nats_of_batch, int8, padding), documents, int8, threads, progress, learned)
    return _summed(len(documents), found)[:, 0]


def _by_window(
    score_batch: Callable[[list[Window]], list[Found]],
    documents: list[Ids],
    model: Generator | ModelConfig,
    threads: int,
    progress: Progress,
    learned: list[Learned] | None,
) -> list[tuple[Window, Found]]:
    """Returns each window of ``documents`` with what ``score_batch`` says of it, always in the same order.

    ``threads`` batches are computed at a time, each on one core: faster than one batch on all cores, and no sum depends
    on how many there are.
    """
    windows = [
        window
        for index, tokens in enumerate(documents)
        for window in windows_of(index, tokens, model.window, None if learned is None else learned[index])
    ]
    windows.sort(key=lambda window: len(window.inputs))
    batches = list(_batches(windows, model.vocab_size))
    rows: list[Found] = []
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for found in pool.map(score_batch, batches):
            rows += found
            progress.update(len(rows), len(windows), "windows")
    return list(zip(windows, rows, strict=True))


def _batches(windows: list[Window], vocabulary: int) -> Iterator[list[Window]]:
    """Yields ``windows``, sorted by length, in batches of at most ``LOGITS_AT_ONCE``, or of one window."""
    batch: list[Window] = []
    for window in windows:
        logits = (len(batch) + 1) * len(window.inputs) * vocabulary
        if batch and (len(batch) == WINDOWS_AT_ONCE or logits > LOGITS_AT_ONCE):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _summed(documents: int, found: list[tuple[Window, Sums]]) -> Sums:
    # [documents, numbers]
    table = np.zeros((documents, len(found[0][1])))
    for window, row in found:
        table[window.document] += row
    return table


@torch.no_grad()
def _score_batch(
    routed: FloatRouting, quantized: Mapping[str, Int8Routing], padding: int, batch: list[Window]
) -> list[dict[str, tuple[Sums, Sums]]]:
    """Returns for each window and each model ("" is float) its sums and, token by token, the divergence from float."""
    ids = _padded(batch, padding)
    x_BTD, experts_float = routed.run(ids)
    caches = {name: side.new_cache(len(ids)) for name, side in quantized.items()}
    # Of each window, of each model: what each piece adds.
    parts: list[dict[str, list[tuple[Sums, Sums]]]] = [{name: [] for name in ("", *quantized)} for _ in batch]
    for piece in _pieces(ids, routed.vocab_size):
        logits_float = routed.head(x_BTD[:, piece])
        read = {name: side.run(ids[:, piece], caches[name]) for name, side in quantized.items()}
        for row, window in enumerate(batch):
            kept, targets = _inside(window, piece)
            log_float = F.log_softmax(logits_float[row, kept], dim=-1)
            parts[row][""].append((np.array(_marks(log_float, targets)), np.zeros(0)))
            for name, (logits, experts) in read.items():
                log = F.log_softmax(logits[row, kept], dim=-1)
                divergence = F.kl_div(log, log_float, reduction="none", log_target=True).sum(dim=-1)
                same_top = float((log.argmax(dim=-1) == log_float.argmax(dim=-1)).sum())
                # [layers, tokens, experts a token]
                same = experts[:, row, kept] == experts_float[:, row, piece][:, kept]
                sums = [*_marks(log, targets), same_top, *same.all(axis=-1).sum(axis=-1)]
                parts[row][name].append((np.array(sums), divergence.double().numpy()))
    return [{name: _added(found) for name, found in models.items()} for models in parts]


def _nats_of_batch(int8: Generator, padding: int, batch: list[Window]) -> list[Sums]:
    ids = _padded(batch, padding)
    cache = int8.new_cache(len(ids))
    nats = np.zeros((len(batch), 1))
    for piece in _pieces(ids, int8.vocab_size):
        logits = torch.from_numpy(int8.run(ids[:, piece], cache))
        for row, window in enumerate(batch):
            kept, targets = _inside(window, piece)
            nats[row] += _marks(F.log_softmax(logits[row, kept], dim=-1), targets)[0]
    return list(nats)


def _pieces(ids: Ids, vocabulary: int) -> Iterator[slice]:
    """Yields the positions of ``ids`` [batch, length], all at once or, of one window, ``LOGITS_AT_ONCE`` at a time."""
    # onnxruntime's grouped attention goes on from a cache in one row alone.
    size = max(1, LOGITS_AT_ONCE // vocabulary) if len(ids) == 1 else ids.shape[1]
    for start in range(0, ids.shape[1], size):
        yield slice(start, min(start + size, ids.shape[1]))


def _inside(window: Window, piece: slice) -> tuple[Ids, torch.Tensor]:
    """Returns which tokens of ``piece`` are scored, counted from where it begins, and what follows each."""
    kept = window.scored[(window.scored >= piece.start) & (window.scored < piece.stop)]
    return kept - piece.start, torch.from_numpy(window.targets[kept])


def _marks(log: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Returns of log probabilities [tokens, vocabulary] the loss in nats, and how many likeliest tokens are right."""
    return [float(F.nll_loss(log, targets, reduction="sum")), float((log.argmax(dim=-1) == targets).sum())]


def _added(parts: list[tuple[Sums, Sums]]) -> tuple[Sums, Sums]:
    sums, divergences = zip(*parts, strict=True)
    return np.sum(sums, axis=0), np.concatenate(divergences)


def _padded(batch: list[Window], token: int) -> Ids:
    # At their ends: attention is causal, so nothing that is scored sees the padding.
    length = max(len(window.inputs) for window in batch)
    ids = np.full((len(batch), length), token, dtype=np.int64)
    for row, window in enumerate(batch):
        ids[row, : len(window.inputs)] = window.inputs
    return ids
