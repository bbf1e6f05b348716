"""Writes the tokens of all splits as shards, by a tokenizer that is trained on the training split or comes with
``train.init``."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tasks import atomic, paths
from tasks.errors import BadInput, BadParameter
from tasks.progress import Progress, progress
from tasks.shard.checkpoint_tokenizer import CheckpointTokenizer
from tasks.shard.conversations import Conversations, of_checkpoint
from tasks.shard.corpus import batches, documents, has_conversations, texts
from tasks.shard.pack import EncodedDocument, PackedShard, pack
from tasks.shard.params import ShardParams
from tasks.shard.tokenizer import train
from tasks.shards import Manifest, ShardEntry, SplitName, digest, encode_shard, token_dtype

SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")


class TextTokenizer(Protocol):
    """What shards need of a tokenizer."""

    vocab_size: int
    bos_token_id: int
    eos_token_id: int

    def encode(self, texts: Sequence[str]) -> Sequence[npt.ArrayLike]:
        """Returns the ids of each text, without special tokens."""

    def to_json(self) -> str:
        """Returns its ``tokenizer.json``."""


def shard(params: ShardParams, origin: Path | None = None) -> Manifest:
    """Writes ``data/shards`` from ``data/corpus`` and returns its manifest.

    ``origin`` is the folder of the checkpoint that training starts from, whose tokenizer is kept; None trains one.
    Raises :class:`BadInput` for a missing or damaged corpus, or a tokenizer that does not keep its text as it is;
    :class:`BadParameter` for a vocabulary that the corpus cannot fill, or that is not the checkpoint's, and for
    conversations without a chat template; :class:`tasks.errors.DiskFull` when there is no room.
    """
    totals = {split: documents(split) for split in SPLITS}
    conversations = of_checkpoint(origin) if has_conversations() else None
    with atomic.folder(paths.SHARDS) as folder, progress("shard") as shown:
        tokenizer = _tokenizer(params, origin, shown, totals["train"])
        content = tokenizer.to_json().encode()
        (folder / paths.TOKENIZER.name).write_bytes(content)
        shown.begin("encode")
        encoding = _Encoding(tokenizer, conversations, shown, sum(totals.values()))
        manifest = Manifest(
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dtype=token_dtype(tokenizer.vocab_size),
            tokenizer_digest=digest(content),
            has_conversations=conversations is not None,
            shards=[
                _write(folder, split, index, packed)
                for split in SPLITS
                for index, packed in enumerate(pack(encoding.documents(split), params.tokens_per_shard))
            ],
            # Known once all are encoded.
            answer_ends=[] if conversations is None else sorted(conversations.ends),
        )
        manifest.write(folder)
        if conversations is not None and (told := conversations.told()):
            shown.notice(told)
    return manifest


def _tokenizer(params: ShardParams, origin: Path | None, shown: Progress, total: int) -> TextTokenizer:
    tokenizer = None if origin is None else CheckpointTokenizer(origin)
    if told := params.misfit(None if tokenizer is None else tokenizer.vocab_size):
        raise BadParameter(f"{paths.PARAMS}: {told}")
    if tokenizer is None:
        assert params.vocab_size is not None
        return train(_training_texts(shown, total), params.vocab_size)
    for split in SPLITS[1:]:
        _check_kept(tokenizer, split)
    return tokenizer


def _check_kept(tokenizer: CheckpointTokenizer, split: SplitName) -> None:
    # What is measured on has to be the text: bits per byte count its bytes.
    changed = total = 0
    for batch in texts(split):
        total += len(batch)
        decoded = tokenizer.decode(tokenizer.encode(batch))
        changed += sum(before != after for before, after in zip(batch, decoded, strict=True))
    if changed:
        raise BadInput(
            f"{paths.INIT / paths.TOKENIZER.name}: {changed} of {total} documents of the {split} split come back "
            "changed, so its loss would be that of another text. Name a checkpoint in train.init whose tokenizer keeps "
            "the text."
        )


def _training_texts(shown: Progress, total: int) -> Iterator[str]:
    shown.begin("tokenizer")
    done = 0
    for batch in texts("train"):
        yield from batch
        done += len(batch)
        shown.update(done, total, "documents")


class _Encoding:
    """Encodes one split after the other and counts."""

    def __init__(
        self, tokenizer: TextTokenizer, conversations: Conversations | None, shown: Progress, total: int
    ) -> None:
        self._tokenizer = tokenizer
        self._conversations = conversations
        self._shown = shown
        self._total = total
        self._done = self._tokens = self._bytes = 0

    def documents(self, split: SplitName) -> Iterator[EncodedDocument]:
        for batch, marks in batches(split):
            for document in self._encode(batch, marks):
                # Of a conversation the bytes are those of the answers.
                learned = document.learned
                self._tokens += len(document.tokens) - 1 if learned is None else int(learned[1:].sum())
                self._bytes += document.bytes
                yield document
            self._done += len(batch)
            bytes_per_token = self._bytes / max(1, self._tokens)
            self._shown.update(self._done, self._total, "documents", bytes_per_token=bytes_per_token)

    def _encode(self, batch: list[str], marks: list[bool]) -> Iterator[EncodedDocument]:
        dtype = token_dtype(self._tokenizer.vocab_size)
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        # Where one token is both, the beginning of the next document is the end of this one.
        end = [] if eos == bos else [eos]
        plain = iter(self._tokenizer.encode([text for text, mark in zip(batch, marks, strict=True) if not mark]))
        for text, is_conversation in zip(batch, marks, strict=True):
            if is_conversation:
                assert self._conversations is not None
                document = self._conversations.encode(text, bos, dtype)
                if document is not None:
                    yield document
                continue
            tokens = np.concatenate([[bos], next(plain), end], dtype=dtype, casting="unsafe")
            learned = None if self._conversations is None else np.ones(len(tokens), dtype=np.uint8)
            yield EncodedDocument(tokens, len(text.encode()), learned)


def _write(folder: Path, split: SplitName, index: int, packed: PackedShard) -> ShardEntry:
    content = encode_shard(packed.tokens, packed.document_offsets, packed.document_bytes, packed.learned)
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
