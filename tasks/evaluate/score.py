"""Scores of the float and the INT8 model on the same documents, token by token, and the loss of a third one."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lm.model import LanguageModel
from lm.runtime import Generator
from tasks.progress import Progress
from tasks.shards import Tokens

WINDOWS_AT_ONCE = 8
Ids = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]
COLUMNS = ("tokens", "bytes", "nats_float", "nats_int8", "kl", "right_float", "right_int8", "same_top")


@dataclass(frozen=True)
class Window:
    """``inputs`` of one forward pass; ``targets[i]`` follows ``inputs[i]`` and counts from ``first`` on."""

    document: int
    inputs: Ids
    targets: Ids
    first: int


@dataclass(frozen=True)
class Scores:
    """Sums over each document: ``table`` [documents, len(COLUMNS)], special tokens left out."""

    table: Sums

    def column(self, name: str) -> Sums:
        return self.table[:, COLUMNS.index(name)]


def windows_of(document: int, tokens: Ids, context: int) -> Iterator[Window]:
    """Yields the windows that score each token of ``tokens`` but the first (BOS) exactly once.

    A document longer than ``context`` is walked in half windows: from the second window on, every scored token sees at
    least half a context before it.
    """
    scored, start = 1, 0
    while scored < len(tokens):
        end = min(start + context, len(tokens) - 1)
        yield Window(document, tokens[start:end], tokens[start + 1 : end + 1], scored - start - 1)
        scored = end + 1
        start = max(start + 1, scored - 1 - context // 2)


def score(
    model: LanguageModel, int8: Generator, documents: list[tuple[Tokens, int]], threads: int, progress: Progress
) -> Scores:
    """Returns the scores of both models on ``documents`` (tokens with BOS first, UTF-8 bytes). Both compute in fp32."""
    ids = [tokens.astype(np.int64) for tokens, _ in documents]
    model.eval()
    progress.begin("scoring")
    sums = _sum_windows(partial(_score_batch, model, int8), ids, model.config.window, threads, progress)
    sizes = [[len(tokens) - 1, size] for tokens, size in documents]
    return Scores(np.hstack([np.array(sizes, dtype=np.float64), sums]))


def nats_of(int8: Generator, documents: list[Ids], threads: int, progress: Progress) -> Sums:
    """Returns the loss of an INT8 model on each of ``documents`` (its own tokens, BOS first), in nats: [documents]."""
    progress.begin("champion")
    padding = int(documents[0][0])
    return _sum_windows(partial(_nats_of_batch, int8, padding), documents, int8.window, threads, progress)[:, 0]


def _sum_windows(
    score_batch: Callable[[list[Window]], list[Sums]],
    documents: list[Ids],
    context: int,
    threads: int,
    progress: Progress,
) -> Sums:
    """Returns what ``score_batch`` says of each window, summed over each document: [documents, numbers].

    ``threads`` batches are computed at a time, each on one core: faster than one batch on all cores, and no sum depends
    on how many there are.
    """
    windows = [window for index, tokens in enumerate(documents) for window in windows_of(index, tokens, context)]
    windows.sort(key=lambda window: len(window.inputs))
    batches = [windows[start : start + WINDOWS_AT_ONCE] for start in range(0, len(windows), WINDOWS_AT_ONCE)]
    rows: list[Sums] = []
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for found in pool.map(score_batch, batches):
            rows += found
            progress.update(len(rows), len(windows), "windows")
    table = np.zeros((len(documents), len(rows[0])))
    for window, row in zip(windows, rows, strict=True):
        table[window.document] += row
    return table


@torch.no_grad()
def _score_batch(model: LanguageModel, int8: Generator, batch: list[Window]) -> list[Sums]:
    ids = _padded(batch, model.config.eos_token_id)
    logits_float = model(torch.from_numpy(ids))
    logits_int8 = torch.from_numpy(int8.run(ids, int8.new_cache(len(batch))))
    results = []
    for row, window in enumerate(batch):
        kept = slice(window.first, len(window.inputs))
        targets = torch.from_numpy(window.targets[kept])
        log_float = F.log_softmax(logits_float[row, kept], dim=-1)
        log_int8 = F.log_softmax(logits_int8[row, kept], dim=-1)
        top_float, top_int8 = log_float.argmax(dim=-1), log_int8.argmax(dim=-1)
        sums = [
            F.nll_loss(log_float, targets, reduction="sum"),
            F.nll_loss(log_int8, targets, reduction="sum"),
            F.kl_div(log_int8, log_float, reduction="sum", log_target=True),
            (top_float == targets).sum(),
            (top_int8 == targets).sum(),
            (top_float == top_int8).sum(),
        ]
        results.append(np.array([float(value) for value in sums]))
    return results


def _nats_of_batch(int8: Generator, padding: int, batch: list[Window]) -> list[Sums]:
    ids = _padded(batch, padding)
    logits = torch.from_numpy(int8.run(ids, int8.new_cache(len(batch))))
    results = []
    for row, window in enumerate(batch):
        kept = slice(window.first, len(window.inputs))
        log = F.log_softmax(logits[row, kept], dim=-1)
        results.append(np.array([float(F.nll_loss(log, torch.from_numpy(window.targets[kept]), reduction="sum"))]))
    return results


def _padded(batch: list[Window], token: int) -> Ids:
    # At their ends: attention is causal, so nothing that is scored sees the padding.
    length = max(len(window.inputs) for window in batch)
    ids = np.full((len(batch), length), token, dtype=np.int64)
    for row, window in enumerate(batch):
        ids[row, : len(window.inputs)] = window.inputs
    return ids
