"""Shards: read in place, and never read when damaged."""

from pathlib import Path

import numpy as np
import pytest

from tasks import shards
from tasks.errors import BadInput
from tasks.shards import PAGE, Manifest, ShardEntry, Shards, encode_shard, read_manifest


def _write(folder: Path, counts: list[int], vocab_size: int = 5000) -> Manifest:
    entries, first = [], 0
    for index, count in enumerate(counts):
        tokens = (np.arange(first, first + count) % vocab_size).astype(shards.token_dtype(vocab_size))
        half = count // 2
        content = encode_shard(tokens, np.array([0, half, count]), np.array([3 * half, 3 * (count - half)]))
        name = f"train-{index:05d}.h5"
        (folder / name).write_bytes(content)
        entries.append(
            ShardEntry(
                file=name, split="train", digest=shards.digest(content), tokens=count, documents=2, bytes=3 * count
            )
        )
        first += count
    manifest = Manifest(
        vocab_size=vocab_size,
        bos_token_id=0,
        eos_token_id=0,
        dtype=shards.token_dtype(vocab_size),
        tokenizer_digest="",
        shards=entries,
    )
    manifest.write(folder)
    return manifest


def test_windows_cover_each_shard_and_overlap_by_the_target(tmp_path: Path) -> None:
    manifest = _write(tmp_path, [101, 9, 57])
    reader = Shards(tmp_path, manifest, "train").reader(10)
    windows = reader.batch(np.arange(len(reader)))
    # 100 / 10 from the first, none from the second (9 tokens), 56 / 10 from the third.
    assert windows.shape == (10 + 0 + 5, 11)
    assert windows[:10, 0].tolist() == list(range(0, 100, 10))
    assert windows[10].tolist() == list(range(110, 121))
    assert (windows[:, 1:] == windows[:, :-1] + 1).all()
    shuffled = np.random.default_rng(0).permutation(len(reader))
    assert (reader.batch(shuffled) == windows[shuffled]).all()
    for outside in (len(reader), -1):
        with pytest.raises(IndexError):
            reader.batch(np.array([0, outside]))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_tokens_are_contiguous_aligned_to_a_page_and_as_small_as_they_can_be(
    vocab_size: int, dtype: str, tmp_path: Path
) -> None:
    import h5py

    _write(tmp_path, [5000], vocab_size)
    with h5py.File(tmp_path / "train-00000.h5") as file:
        assert file["tokens"].dtype == dtype
        assert file["tokens"].chunks is None
        assert file["tokens"].id.get_offset() % PAGE == 0


def test_equal_tokens_give_equal_bytes(tmp_path: Path) -> None:
    arguments = np.arange(9, dtype=np.uint16), np.array([0, 9]), np.array([20])
    assert encode_shard(*arguments) == encode_shard(*arguments)


def test_documents_come_back_with_their_sizes(tmp_path: Path) -> None:
    documents = Shards(tmp_path, _write(tmp_path, [11, 4]), "train").documents()
    assert [(tokens.tolist(), size) for tokens, size in documents] == [
        ([0, 1, 2, 3, 4], 15),
        ([5, 6, 7, 8, 9, 10], 18),
        ([11, 12], 6),
        ([13, 14], 6),
    ]


@pytest.mark.parametrize("where", [0, 4096 + 100, -1])
def test_a_flipped_byte_names_its_shard_before_hdf5_sees_it(
    where: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = _write(tmp_path, [3000, 3000])
    path = tmp_path / "train-00001.h5"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    opened = []
    real = shards.h5py.File
    monkeypatch.setattr(shards.h5py, "File", lambda path, mode: opened.append(path.name) or real(path, mode))
    with pytest.raises(BadInput, match=r"train-00001\.h5: damaged"):
        Shards(tmp_path, manifest, "train")
    assert opened == ["train-00000.h5"]


def test_a_missing_shard_and_a_missing_manifest_are_named(tmp_path: Path) -> None:
    manifest = _write(tmp_path, [30])
    (tmp_path / "train-00000.h5").unlink()
    with pytest.raises(BadInput, match=r"train-00000\.h5: .* missing"):
        Shards(tmp_path, manifest, "train")
    (tmp_path / "manifest.json").write_text('{"vocab_size": "many"}')
    with pytest.raises(BadInput, match=r"manifest\.json: not a manifest"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(BadInput, match=r"manifest\.json: no such file"):
        read_manifest(tmp_path)
