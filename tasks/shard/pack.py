"""Packs documents into shards, whole and in order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.shards import Learned, Tokens


@dataclass(frozen=True)
class EncodedDocument:
    """The tokens of one document, [tokens], BOS first, EOS last if that is another, and the UTF-8 bytes of its text.

    ``learned`` [tokens] is there where the corpus has conversations: see :mod:`tasks.shards`.
    """

    tokens: Tokens
    bytes: int
    learned: Learned | None = None


@dataclass(frozen=True)
class PackedShard:
    """The documents of one shard: tokens [tokens], offsets [documents + 1] and sizes in bytes [documents]."""

    tokens: Tokens
    document_offsets: npt.NDArray[np.int64]
    document_bytes: npt.NDArray[np.int64]
    learned: Learned | None


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
    learned = [document.learned for document in documents if document.learned is not None]
    lengths = [len(document.tokens) for document in documents]
    return PackedShard(
        np.concatenate([document.tokens for document in documents]),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.array([document.bytes for document in documents], dtype=np.int64),
        np.concatenate(learned) if learned else None,
    )
