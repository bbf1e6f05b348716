"""Trains the tokenizer on the training split and writes the tokens of all splits as shards."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks import atomic, paths
from tasks.progress import Progress, progress
from tasks.shard.corpus import batches, documents
from tasks.shard.pack import EncodedDocument, PackedShard, pack
from tasks.shard.params import ShardParams
from tasks.shard.tokenizer import BytePairTokenizer, train
from tasks.shards import Manifest, ShardEntry, SplitName, digest, encode_shard, token_dtype

SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")


def shard(params: ShardParams) -> Manifest:
    """Writes ``data/shards`` from ``data/corpus`` and returns its manifest.

    Raises :class:`BadInput` for a missing or damaged corpus, :class:`BadParameter` for a vocabulary that the corpus
    cannot fill, :class:`DiskFull` when there is no room.
    """
    totals = {split: documents(split) for split in SPLITS}
    with atomic.folder(paths.SHARDS) as folder, progress("shard") as shown:
        tokenizer = train(_training_texts(shown, totals["train"]), params.vocab_size)
        content = tokenizer.to_json().encode()
        (folder / paths.TOKENIZER.name).write_bytes(content)
        shown.begin("encode")
        encoding = _Encoding(tokenizer, shown, sum(totals.values()))
        manifest = Manifest(
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.bos_token_id,
            dtype=token_dtype(tokenizer.vocab_size),
            tokenizer_digest=digest(content),
            shards=[
                _write(folder, split, index, packed)
                for split in SPLITS
                for index, packed in enumerate(pack(encoding.documents(split), params.tokens_per_shard))
            ],
        )
        manifest.write(folder)
    return manifest


def _training_texts(shown: Progress, total: int) -> Iterator[str]:
    shown.begin("tokenizer")
    done = 0
    for texts in batches("train"):
        yield from texts
        done += len(texts)
        shown.update(done, total, "documents")


class _Encoding:
    """Encodes one split after the other and counts."""

    def __init__(self, tokenizer: BytePairTokenizer, shown: Progress, total: int) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._total = total
        self._done = self._tokens = self._bytes = 0

    def documents(self, split: SplitName) -> Iterator[EncodedDocument]:
        dtype = token_dtype(self._tokenizer.vocab_size)
        bos = self._tokenizer.bos_token_id
        for texts in batches(split):
            for text, ids in zip(texts, self._tokenizer.encode(texts), strict=True):
                document = EncodedDocument(np.array([bos, *ids], dtype=dtype), len(text.encode()))
                self._tokens += len(ids)
                self._bytes += document.bytes
                yield document
            self._done += len(texts)
            bytes_per_token = self._bytes / max(1, self._tokens)
            self._shown.update(self._done, self._total, "documents", bytes_per_token=bytes_per_token)


def _write(folder: Path, split: SplitName, index: int, packed: PackedShard) -> ShardEntry:
    content = encode_shard(packed.tokens, packed.document_offsets, packed.document_bytes)
    file = f"{split}-{index:05d}.h5"
    (folder / file).write_bytes(content)
    return ShardEntry(
        file=file,
        split=split,
        digest=digest(content),
        tokens=len(packed.tokens),
        documents=len(packed.document_bytes),
        bytes=int(packed.document_bytes.sum()),
    )
