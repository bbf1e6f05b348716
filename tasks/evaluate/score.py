"""Scores of the float and the INT8 model on the same documents, token by token."""

from collections.abc import Iterator
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
COLUMNS = ("tokens", "bytes", "nats_float", "nats_int8", "kl", "right_float", "right_int8", "same_top")


@dataclass(frozen=True)
class Window:
    """``inputs`` of one forward pass; ``targets[i]`` follows ``inputs[i]`` and counts from ``first`` on."""

    document: int
    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    first: int


@dataclass(frozen=True)
class Scores:
    """Sums over each document: ``table`` [documents, len(COLUMNS)], special tokens left out."""

    table: npt.NDArray[np.float64]

    def column(self, name: str) -> npt.NDArray[np.float64]:
        return self.table[:, COLUMNS.index(name)]


def windows_of(document: int, tokens: npt.NDArray[np.int64], context: int) -> Iterator[Window]:
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
    """Returns the scores of both models on ``documents`` (tokens with BOS first, UTF-8 bytes). Both compute in fp32.

    ``threads`` batches are computed at a time, each on one core: faster than one batch on all cores, and no sum depends
    on how many there are.
    """
    table = np.zeros((len(documents), len(COLUMNS)))
    windows: list[Window] = []
    for index, (tokens, size) in enumerate(documents):
        table[index, COLUMNS.index("tokens")] = len(tokens) - 1
        table[index, COLUMNS.index("bytes")] = size
        windows += windows_of(index, tokens.astype(np.int64), model.config.max_position_embeddings)
    windows.sort(key=lambda window: len(window.inputs))
    model.eval()
    progress.begin("scoring")
    batches = [windows[start : start + WINDOWS_AT_ONCE] for start in range(0, len(windows), WINDOWS_AT_ONCE)]
    done = 0
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch, sums in zip(batches, pool.map(partial(_score_batch, model, int8), batches), strict=True):
            for window, row in zip(batch, sums, strict=True):
                table[window.document, 2:] += row
            done += len(batch)
            progress.update(done, len(windows), "windows")
    return Scores(table)


@torch.no_grad()
def _score_batch(model: LanguageModel, int8: Generator, batch: list[Window]) -> list[npt.NDArray[np.float64]]:
    # Windows are padded at their ends: attention is causal, so nothing that is scored sees the padding.
    length = max(len(window.inputs) for window in batch)
    ids = np.full((len(batch), length), model.config.eos_token_id, dtype=np.int64)
    for row, window in enumerate(batch):
        ids[row, : len(window.inputs)] = window.inputs
    logits_float = model(torch.from_numpy(ids))
    logits_int8 = torch.from_numpy(int8.run(ids, int8.empty_cache(len(batch)))[0])
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
