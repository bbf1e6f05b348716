"""Packs documents into shards, whole and in order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.shards import Tokens


@dataclass(frozen=True)
class EncodedDocument:
    """The tokens of one document, [tokens], BOS first, and the UTF-8 bytes of its text."""

    tokens: Tokens
    bytes: int


@dataclass(frozen=True)
class PackedShard:
    """The documents of one shard: tokens [tokens], offsets [documents + 1] and sizes in bytes [documents]."""

    tokens: Tokens
    document_offsets: npt.NDArray[np.int64]
    document_bytes: npt.NDArray[np.int64]


def pack(documents: Iterable[EncodedDocument], tokens_per_shard: int) -> Iterator[PackedShard]:
    """Yields shards of at most ``tokens_per_shard`` tokens; a document that is longer gets a shard of its own."""
    held: list[EncodedDocument] = []
    tokens = 0
    for document in documents:
        if held and tokens + len(document.tokens) > tokens_per_shard:
            yield _join(held)
            held, tokens = [], 0
        held.append(document)
        tokens += len(document.tokens)
    if held:
        yield _join(held)


def _join(documents: list[EncodedDocument]) -> PackedShard:
    lengths = [len(document.tokens) for document in documents]
    return PackedShard(
        np.concatenate([document.tokens for document in documents]),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.array([document.bytes for document in documents], dtype=np.int64),
    )
