"""What any model has to beat on the same text: a character n-gram model, and a compressor primed with the corpus."""

import lzma

import numpy as np

from tasks.bootstrap import Bootstrap
from tasks.evaluate.ngram import NGram
from tasks.evaluate.report import Baselines, NGramResult, Point, XzResult

# xz -9 looks back 64 MiB, so more text than that could not prime it; the n-gram model learns from the same text.
MOST_BYTES = 64 * 2**20


def measure(train: list[str], test: list[str], order: int, bootstrap: Bootstrap) -> Baselines:
    """Returns the bits per byte of ``test`` under both baselines, which know ``train``, of MOST_BYTES at most."""
    sizes = np.array([len(text.encode()) for text in test], dtype=np.float64)
    bits = NGram(train, order).bits(test)
    return Baselines(
        trained_on_bytes=sum(len(text.encode()) for text in train),
        ngram=NGramResult(order=order, bits_per_byte=bootstrap.ratio(bits, sizes)),
        xz=XzResult(bits_per_byte=Point(value=round(_primed_xz_bits("".join(train), "".join(test)) / sizes.sum(), 6))),
    )


def _primed_xz_bits(train: str, test: str) -> int:
    alone = len(lzma.compress(train.encode(), preset=9))
    both = len(lzma.compress((train + test).encode(), preset=9))
    return (both - alone) * 8
