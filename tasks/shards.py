"""Tokens on disk: contiguous HDF5 shards that are read in place, and the manifest that vouches for them.

A shard holds three one-dimensional datasets: ``tokens`` (uint16, or uint32 for large vocabularies; page-aligned,
contiguous, uncompressed), ``document_offsets`` (int64, one more than there are documents) and ``document_bytes``
(int64, UTF-8 bytes of each document's text). Each document begins with the BOS token. Where the corpus has
conversations there is a fourth one, ``learned`` (uint8, one for each token): 1 where the token is to be learned, 0
where it is only read, as all but the assistant's answers is; a conversation's bytes are those of its answers.

A reader checks a shard's digest before HDF5 sees the file: a flipped byte in a contiguous dataset is silent, and a
damaged header can hang libhdf5 (hdf5#1707). After that h5py only tells where the data lies; the tokens are then read by
memory map, at the cost of ``np.memmap`` (h5py's own slices are about ten times slower).
"""

import dataclasses
import io
import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Buffer

from tasks import atomic, paths
from tasks.errors import BadInput

PAGE = 4096
SplitName = Literal["train", "valid", "test"]
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Learned = npt.NDArray[np.uint8]

# What a training sees: what it learns from, and what it is validated on.
SEEN: tuple[SplitName, SplitName] = ("train", "valid")


class ShardEntry(BaseModel):
    """One shard, as the manifest records it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    split: SplitName
    digest: str
    tokens: int
    documents: int
    bytes: int


class Manifest(BaseModel):
    """What ``data/shards`` holds. Written last: where it lies, everything it names was complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    dtype: Literal["uint16", "uint32"]
    tokenizer_digest: str
    shards: list[ShardEntry]
    # Whether the shards say which tokens are learned.
    has_conversations: bool = False
    # The control tokens by which answers end.
    answer_ends: list[int] = []

    def write(self, folder: Path) -> None:
        atomic.write_json(folder / paths.MANIFEST.name, self.model_dump(exclude_defaults=True))

    def of_split(self, split: SplitName) -> list[ShardEntry]:
        return [shard for shard in self.shards if shard.split == split]

    def check_tokenizer(self, folder: Path) -> None:
        """Raises :class:`BadInput` when the tokenizer in ``folder`` is not the one that made the shards."""
        path = folder / paths.TOKENIZER.name
        found = digest(path.read_bytes()) if path.is_file() else "missing"
        if found != self.tokenizer_digest:
            raise BadInput(
                f"{path}: not the tokenizer that made the shards: its digest is {found}, the manifest says "
                f"{self.tokenizer_digest}. Fetch it again (dvc checkout --force {paths.SHARDS}) or rerun 'shard'."
            )


def digest(content: Buffer) -> str:
    """The 128-bit XXH3 digest in hexadecimal: some ten times faster than SHA-256, against accidents, not attackers."""
    return xxhash.xxh3_128_hexdigest(content)


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest unsigned type that holds each id below ``vocab_size``."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def encode_shard(
    tokens: Tokens,
    document_offsets: npt.NDArray[np.int64],
    document_bytes: npt.NDArray[np.int64],
    learned: Learned | None = None,
) -> bytes:
    """Returns the HDF5 file of one shard, as bytes; equal arguments give equal bytes.

    The file is built in memory and written in one go by the caller: a disk that fills up is then an ordinary error of
    ``write``, not one that surfaces while libhdf5 closes a file.
    """
    image = io.BytesIO()
    with h5py.File(image, "w", libver="latest", alignment_threshold=PAGE, alignment_interval=PAGE) as file:
        file.create_dataset("tokens", data=tokens)
        file.create_dataset("document_offsets", data=document_offsets)
        file.create_dataset("document_bytes", data=document_bytes)
        if learned is not None:
            file.create_dataset("learned", data=learned)
    return image.getvalue()


def read_manifest(folder: Path = paths.SHARDS) -> Manifest:
    """Returns the manifest in ``folder``. Raises :class:`BadInput` when it is missing or not a manifest."""
    path = folder / paths.MANIFEST.name
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file. Run the stage 'shard' first.") from None
    except ValidationError as error:
        raise BadInput(f"{path}: not a manifest of shards ({error.error_count()} faults). Rerun 'shard'.") from None


class Shards:
    """The shards of one split, verified and mapped."""

    def __init__(
        self, folder: Path, manifest: Manifest, split: SplitName, moved: Callable[[], None] = lambda: None
    ) -> None:
        """Checks each shard's digest, then maps it, and calls ``moved``.

        Raises :class:`BadInput` that names a missing or damaged shard.
        """
        self.entries = manifest.of_split(split)
        self._files = []
        for entry in self.entries:
            self._files.append(_map_shard(folder / entry.file, entry, manifest.dtype))
            moved()

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.entries)

    def reader(self, length: int) -> "WindowReader":
        """Returns a reader of windows of ``length`` + 1 tokens: inputs and, shifted by one, their targets.

        Windows step by ``length``, so each token is a target at most once; a shard's last few tokens are left over.
        """
        learned = [file.learned for file in self._files if file.learned is not None]
        return WindowReader([file.tokens for file in self._files], length, learned)

    def documents(self) -> list[tuple[Tokens, int]]:
        """Returns each document: its tokens as they are learned, BOS first, and the UTF-8 bytes of its text."""
        found = []
        for file in self._files:
            for start, end, size in zip(file.offsets[:-1], file.offsets[1:], file.bytes, strict=True):
                found.append((file.tokens[start:end], int(size)))
        return found

    def learned(self) -> list[npt.NDArray[np.bool_]] | None:
        """Returns which tokens of each document are to be learned; None where all are, but the first."""
        found = []
        for file in self._files:
            if file.learned is None:
                return None
            pairs = itertools.pairwise(file.offsets)
            found += [file.learned[start:end].astype(np.bool_) for start, end in pairs]
        return found


class WindowReader:
    """Reads windows of ``length`` + 1 tokens by their global index, each from its memory-mapped shard.

    ``learned``, one array a shard, says with 1 which tokens are to be learned; without it all are. It is read in the
    same windows.
    """

    def __init__(
        self, shards: Sequence[Tokens] | Sequence[Learned], length: int, learned: Sequence[Learned] = ()
    ) -> None:
        self.length = length
        self.learned = WindowReader(learned, length) if learned else None
        # One row a window, rows overlapping by one token: a view, no copy.
        self._shards = [_windows(shard, length) for shard in shards if len(shard) > length]
        self._ends = list(itertools.accumulate(len(shard) for shard in self._shards))
        self._starts = [end - len(shard) for end, shard in zip(self._ends, self._shards, strict=True)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def batch(self, indices: npt.NDArray[np.int64]) -> Tokens:
        """Returns the windows of ``indices`` [n] as an array [n, length + 1] in the shards' own type.

        Raises IndexError when an index is not below ``len(self)``.
        """
        wanted = indices.tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) < len(self):
            raise IndexError(f"windows {min(wanted)} to {max(wanted)} of {len(self)}")
        if len(self._shards) == 1:
            return self._shards[0][indices]
        # A loop beats NumPy's masks here: 1.0 against 1.5 microseconds a window of 2,049 tokens over four shards.
        batch: Tokens = np.empty((len(indices), self.length + 1), dtype=self._shards[0].dtype)
        shards, starts, ends = self._shards, self._starts, self._ends
        for row, index in enumerate(wanted):
            shard = bisect_right(ends, index)
            batch[row] = shards[shard][index - starts[shard]]
        return batch


@dataclasses.dataclass(frozen=True)
class Windows:
    """What a training reads: the windows that it learns from, and those that it is validated on."""

    train: WindowReader
    valid: WindowReader


def read_windows(manifest: Manifest, length: int, moved: Callable[[], None] = lambda: None) -> Windows:
    """Returns the windows of ``length`` + 1 tokens in the shards of this project.

    Checks each shard's digest, and calls ``moved`` then. Raises :class:`BadInput` that names a missing or damaged one.
    """
    return Windows(*(Shards(paths.SHARDS, manifest, split, moved).reader(length) for split in SEEN))


def share_learned(windows: WindowReader, indices: npt.NDArray[np.int64]) -> float:
    """Returns the share of the targets in the windows of ``indices`` that are to be learned; never 0, to divide by."""
    if windows.learned is None:
        return 1.0
    targets = windows.learned.batch(indices)[:, 1:]
    return max(1, int(targets.sum())) / targets.size


def _windows(tokens: Tokens | Learned, length: int) -> Tokens:
    count = (len(tokens) - 1) // length
    strides = (length * tokens.itemsize, tokens.itemsize)
    windows: Any = np.lib.stride_tricks.as_strided(tokens, (count, length + 1), strides, writeable=False)
    return windows


class _MappedShard(NamedTuple):
    tokens: Tokens
    offsets: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    learned: Learned | None


def _map_shard(path: Path, entry: ShardEntry, dtype: str) -> _MappedShard:
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r")
    except (FileNotFoundError, ValueError):
        raise BadInput(f"{path}: the manifest names this shard, but it is missing or empty. Rerun 'shard'.") from None
    found = digest(content.data)
    if found != entry.digest:
        raise BadInput(
            f"{path}: damaged: its digest is {found}, the manifest says {entry.digest}. "
            f"Fetch it again (dvc checkout --force {paths.SHARDS}) or rerun 'shard'."
        )
    with h5py.File(path, "r") as file:
        tokens = _in_place(path, file["tokens"], np.dtype(dtype))
        learned: Any = _in_place(path, file["learned"], np.dtype(np.uint8)) if "learned" in file else None
        return _MappedShard(tokens, file["document_offsets"][:], file["document_bytes"][:], learned)


def _in_place(path: Path, dataset: h5py.Dataset, dtype: np.dtype[Any]) -> Tokens:
    offset = dataset.id.get_offset()
    if offset is None:
        raise BadInput(f"{path}: its tokens are not contiguous (virtual, chunked or compressed). Rerun 'shard'.")
    # A plain array over the map: slicing the subclass np.memmap costs about as much again as the read.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=dataset.shape))
