"""What any model has to beat on the same text: a character n-gram model, and a compressor primed with the corpus."""

import lzma
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tasks.bootstrap import Bootstrap
from tasks.evaluate.ngram import NGram
from tasks.evaluate.report import Baselines, NGramResult, Point, XzResult
from tasks.progress import Progress

# xz -9 looks back 64 MiB, so more text than that could not prime it; the n-gram model learns from the same text.
MOST_BYTES = 64 * 2**20


def measure(train: list[str], test: list[str], order: int, bootstrap: Bootstrap, progress: Progress) -> Baselines:
    """Returns the bits per byte of ``test`` under both baselines, which know ``train``, of MOST_BYTES at most."""
    progress.begin("baselines")
    progress.update(0, 2, "baselines")
    sizes = np.array([len(text.encode()) for text in test], dtype=np.float64)
    known, unknown = "".join(train).encode(), "".join(test).encode()
    # Compressing leaves the interpreter to the n-gram model, and takes twice as long.
    with ThreadPoolExecutor(2) as pool:
        alone, both = (pool.submit(_compressed, text) for text in (known, known + unknown))
        bits = NGram(train, order).bits(test)
        progress.update(1, 2, "baselines")
        primed = (both.result() - alone.result()) * 8
    progress.update(2, 2, "baselines")
    return Baselines(
        trained_on_bytes=len(known),
        ngram=NGramResult(order=order, bits_per_byte=bootstrap.ratio(bits, sizes)),
        xz=XzResult(bits_per_byte=Point(value=round(primed / sizes.sum(), 6))),
    )


def _compressed(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))
