"""The stage ``shard``: one tokenizer whichever library reads it, and shards that hold every document."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import paths
from tasks.errors import BadInput, BadParameter, DiskFull
from tasks.shard import corpus
from tasks.shard.pack import EncodedDocument, pack
from tasks.shard.params import ShardParams
from tasks.shard.shard import SPLITS, shard
from tasks.shard.tokenizer import END_OF_TEXT, BytePairTokenizer, split_of, train
from tasks.shards import Shards, digest, read_manifest

TRAINING = [
    "In the beginning God created the heaven and the earth.\n" * 3,
    "And the earth was without form, and void;   and darkness 1234567 was 12 upon the face of the deep.",
    "def f(x):\n\treturn x  # caf\u00e9 \u00fcber na\u00efve\r\n\r\n    if x:\n        pass",
    "Здравствуй, мир! 你好，世界。 नमस्ते دنيا",
]
VARIED = [
    *TRAINING,
    "",
    " ",
    "\n",
    "  \n \t leading and trailing  ",
    "don't we'll LORD'S I'M",
    "0 1 12 123 1234 12345678901234567890 \u0663\u0664 \u00bd \u2168",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \U0001f44b\U0001f3fd!!!???...",
    "e\u0301 \u0301 a\u0300\u0301\u0302 \u200b\u200d\ufeff\u00a0\u3000\u2028x\u0085y",
    "a\r\nb\rc\n\n\nd\x00\x1b\x7f",
    f"{END_OF_TEXT} is plain text{END_OF_TEXT}",
    " " * 70 + "x" + "\n" * 130 + " " * 64 + "y",
    "a" * 200 + "!" * 200 + "1" * 200,
    "\ud7ff\ue000\uffff\U0010ffff",
]


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return train(TRAINING, 400)


@pytest.fixture(scope="module")
def loaded(tokenizer: BytePairTokenizer, tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    return tokenizers.Tokenizer.from_file(str(path))


def ids_of(tokenizer: BytePairTokenizer, text: str) -> list[int]:
    (ids,) = tokenizer.encode([text])
    return ids.tolist()


@pytest.mark.parametrize("text", VARIED, ids=range(len(VARIED)))
def test_tokenizers_and_tiktoken_give_the_same_ids(
    tokenizer: BytePairTokenizer, loaded: tokenizers.Tokenizer, text: str
) -> None:
    ids = ids_of(tokenizer, text)
    if END_OF_TEXT not in text:
        assert loaded.encode(text, add_special_tokens=False).ids == ids
    assert b"".join(list(tokenizer.ranks)[id_] for id_ in ids).decode() == text
    assert loaded.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="the and\n\t\r 12.,'é\u0301न")))
def test_tokenizers_and_tiktoken_agree_on_any_text(
    tokenizer: BytePairTokenizer, loaded: tokenizers.Tokenizer, text: str
) -> None:
    ids = ids_of(tokenizer, text)
    assert loaded.encode(text, add_special_tokens=False).ids == ids
    assert loaded.decode(ids) == text


def test_libraries_agree_on_what_is_a_letter_a_digit_and_a_space(tokenizer: BytePairTokenizer) -> None:
    # One merge for each class of neighbour and lead byte shows whether a character joined that neighbour's piece; the
    # tables of Unicode behind the two regex engines are of different ages.
    ranks = {bytes([byte]): byte for byte in range(256)}
    for neighbour in b"a1! ":
        for lead in range(0x80, 0x100):
            ranks[bytes([neighbour, lead])] = len(ranks)
    probe = BytePairTokenizer(ranks)
    loaded = tokenizers.Tokenizer.from_str(probe.to_json())
    characters = [chr(code) for code in range(0x80, 0x32000, 3) if not 0xD800 <= code < 0xE000]
    texts = ["".join(f"{neighbour}{char}x\n" for char in characters) for neighbour in "a1! "]
    for text, ids in zip(texts, probe.encode(texts), strict=True):
        assert loaded.encode(text, add_special_tokens=False).ids == ids.tolist()


def test_the_special_token_is_last_and_begins_a_text(
    tokenizer: BytePairTokenizer, loaded: tokenizers.Tokenizer
) -> None:
    assert tokenizer.vocab_size == loaded.get_vocab_size() == 400
    assert tokenizer.bos_token_id == loaded.token_to_id(END_OF_TEXT) == 399
    ids = ids_of(tokenizer, "the earth")
    assert loaded.encode("the earth").ids == [399, *ids]
    assert loaded.decode([399, *ids], skip_special_tokens=True) == "the earth"


def test_a_special_token_spelled_in_a_text_is_plain_text(tokenizer: BytePairTokenizer) -> None:
    assert tokenizer.bos_token_id not in ids_of(tokenizer, END_OF_TEXT)


def test_every_merge_joins_two_earlier_tokens(tokenizer: BytePairTokenizer) -> None:
    for token, rank in tokenizer.ranks.items():
        if len(token) > 1:
            left, right = split_of(token, tokenizer.ranks)
            assert left + right == token
            assert max(tokenizer.ranks[left], tokenizer.ranks[right]) < rank


@pytest.mark.parametrize("run", [" ", "\n", "a", "!", "\u0301"])
def test_an_endless_run_of_one_character_is_encoded(tokenizer: BytePairTokenizer, run: str) -> None:
    text = run * 300_000 + "x"
    ids = ids_of(tokenizer, text)
    tokens = list(tokenizer.ranks)
    assert b"".join(tokens[id_] for id_ in ids).decode() == text


def test_encoding_makes_no_python_object_of_a_token(tokenizer: BytePairTokenizer) -> None:
    text = "In the beginning. " * 20_000
    tracemalloc.start()
    (ids,) = tokenizer.encode([text])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < len(ids)


@pytest.mark.parametrize("texts", [[], [""], ["ab"], ["the the the"]])
def test_a_corpus_too_small_for_the_vocabulary_says_what_it_yields(texts: list[str]) -> None:
    with pytest.raises(
        BadParameter, match=r"shard\.vocab_size: .* too small for 4096 tokens; it yields (\d+)"
    ) as refused:
        train(texts, 4096)
    reachable = int(str(refused.value).split("yields ")[1].split(".")[0])
    assert train(texts, reachable).vocab_size == reachable
    with pytest.raises(BadParameter):
        train(texts, reachable + 1)


Texts = dict[str, list[str]]


@pytest.fixture
def texts() -> Texts:
    generator = np.random.default_rng(0)
    words = [word for text in TRAINING for word in text.split()]
    made = [" ".join(generator.choice(words, generator.integers(5, 60))) for _ in range(300)]
    return {"train": [*TRAINING, *made[:240]], "valid": made[240:270], "test": [*made[270:], VARIED[10]]}


@pytest.fixture
def write_corpus(project: Path) -> Callable[[Texts], None]:
    """Writes the splits, each in two parts."""

    def write(texts: Texts) -> None:
        for split, rows in texts.items():
            folder = project / paths.CORPUS / split
            folder.mkdir(parents=True, exist_ok=True)
            half = len(rows) // 2
            for index, part in enumerate((rows[:half], rows[half:])):
                pq.write_table(pa.table({"text": pa.array(part, pa.string())}), folder / f"part-{index:05d}.parquet")

    return write


def params(**changes: Any) -> ShardParams:
    return ShardParams.model_validate({"vocab_size": 400, "tokens_per_shard": 1000} | changes)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_every_document_in_order(texts: Texts, write_corpus: Callable[[Texts], None]) -> None:
    write_corpus(texts)
    manifest = shard(params())
    assert read_manifest() == manifest
    assert (manifest.vocab_size, manifest.bos_token_id, manifest.eos_token_id) == (400, 399, 399)
    assert manifest.tokenizer_digest == digest(paths.TOKENIZER.read_bytes())
    loaded = tokenizers.Tokenizer.from_file(str(paths.TOKENIZER))
    for split in SPLITS:
        documents = Shards(paths.SHARDS, manifest, split).documents()
        assert [loaded.decode(tokens[1:].tolist()) for tokens, _ in documents] == texts[split]
        assert [size for _, size in documents] == [len(text.encode()) for text in texts[split]]
        assert all(tokens[0] == 399 and 399 not in tokens[1:] for tokens, _ in documents)
        entries = manifest.of_split(split)
        assert [entry.file for entry in entries] == [f"{split}-{index:05d}.h5" for index in range(len(entries))]
        assert sum(entry.documents for entry in entries) == len(texts[split])
        assert sum(entry.bytes for entry in entries) == sum(len(text.encode()) for text in texts[split])
    assert len(manifest.of_split("train")) > 3
    assert {path.name for path in paths.SHARDS.iterdir()} == {
        "manifest.json",
        "tokenizer.json",
        *(entry.file for entry in manifest.shards),
    }


def test_bytes_are_the_same_on_any_number_of_cores(  # type: ignore[no-untyped-def]
    texts: Texts, write_corpus: Callable[[Texts], None], write_params, run_stage, monkeypatch
) -> None:
    write_corpus(texts)
    monkeypatch.setattr(corpus, "DOCUMENTS_PER_BATCH", 7)
    shard(params())
    here = files_of(paths.SHARDS)
    write_params(shard={"vocab_size": 400, "tokens_per_shard": 1000})
    original = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(original)})
        result = run_stage("shard", RAYON_NUM_THREADS="1")
    finally:
        os.sched_setaffinity(0, original)
    assert result.returncode == 0, result.stderr
    assert files_of(paths.SHARDS) == here
    run_stage("shard", RAYON_NUM_THREADS="7")
    assert files_of(paths.SHARDS) == here


def document(length: int) -> EncodedDocument:
    return EncodedDocument(np.arange(length, dtype=np.uint16), 10 * length)


@pytest.mark.parametrize(
    ("lengths", "shards"),
    [
        ([], []),
        ([3], [[3]]),
        ([4, 6], [[4, 6]]),
        ([4, 7], [[4], [7]]),
        ([4, 30, 4, 4], [[4], [30], [4, 4]]),
        ([30, 30], [[30], [30]]),
        ([1] * 25, [[1] * 10, [1] * 10, [1] * 5]),
    ],
)
def test_documents_stay_whole_in_shards_of_ten_tokens(lengths: list[int], shards: list[list[int]]) -> None:
    packed = list(pack(map(document, lengths), 10))
    assert [np.diff(one.document_offsets).tolist() for one in packed] == shards
    assert [len(one.tokens) for one in packed] == [sum(lengths) for lengths in shards]
    assert [(one.document_bytes // 10).tolist() for one in packed] == shards
    assert all(one.tokens.dtype == np.uint16 and one.document_offsets.dtype == np.int64 for one in packed)


def test_a_large_vocabulary_is_stored_in_four_bytes(texts: Texts, write_corpus: Callable[[Texts], None]) -> None:
    generator = np.random.default_rng(1)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    rows = [" ".join("".join(generator.choice(letters, 9)) for _ in range(500)) for _ in range(70)]
    write_corpus({"train": rows, "valid": rows[:2], "test": rows[2:4]})
    manifest = shard(params(vocab_size=65600, tokens_per_shard=10**6))
    assert manifest.dtype == "uint32"
    (tokens, _), *_ = Shards(paths.SHARDS, manifest, "valid").documents()
    assert (tokens.dtype, int(tokens[0])) == (np.uint32, 65599)
    loaded = tokenizers.Tokenizer.from_file(str(paths.TOKENIZER))
    assert loaded.decode(tokens[1:].tolist()) == rows[0]


class TestRefusals:
    """Each is one line, exits with 2 and leaves no shards."""

    def refuse(self, run_stage, the_error) -> str:  # type: ignore[no-untyped-def]
        message: str = the_error(run_stage("shard"))
        assert not list(Path("data").glob("*shards*"))
        return message

    def test_no_corpus(self, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        write_params()
        assert "data/corpus/train: no corpus. Run the stage 'ingest' first." in self.refuse(run_stage, the_error)

    @pytest.mark.parametrize("split", SPLITS)
    def test_a_damaged_corpus(  # type: ignore[no-untyped-def]
        self, texts, write_corpus, write_params, run_stage, the_error, split: str
    ) -> None:
        write_corpus(texts)
        file = Path(paths.CORPUS / split / "part-00001.parquet")
        file.write_bytes(file.read_bytes()[:-20])
        write_params(shard={"vocab_size": 400})
        assert f"{file}: damaged or truncated" in self.refuse(run_stage, the_error)

    def test_a_corpus_too_small(self, texts, write_corpus, write_params, run_stage, the_error) -> None:  # type: ignore[no-untyped-def]
        write_corpus(texts)
        write_params(shard={"vocab_size": 100_000})
        assert "shard.vocab_size: the training split is too small" in self.refuse(run_stage, the_error)

    def test_a_full_disk(self, project, texts, write_corpus, write_params, run_stage, the_error, small_disk) -> None:  # type: ignore[no-untyped-def]
        write_corpus({split: rows * 40 for split, rows in texts.items()})
        (project / "data/corpus").rename(project / "corpus")
        small_disk(project / "data", 256)
        (project / "data/corpus").symlink_to(project / "corpus")
        write_params(shard={"vocab_size": 400, "tokens_per_shard": 20000})
        message = self.refuse(run_stage, the_error)
        assert "data/shards: the disk is full" in message
        assert "Free some space and run again." in message


def test_a_full_disk_leaves_the_last_good_shards_as_they_were(  # type: ignore[no-untyped-def]
    project: Path, texts: Texts, write_corpus: Callable[[Texts], None], small_disk
) -> None:
    write_corpus({split: rows * 40 for split, rows in texts.items()})
    (project / "data/corpus").rename(project / "corpus")
    small_disk(project / "data", 256)
    (project / "data/corpus").symlink_to(project / "corpus")
    (project / "data/shards").mkdir()
    (project / "data/shards/manifest.json").write_text("{}")
    with pytest.raises(DiskFull):
        shard(params(tokens_per_shard=20000))
    assert {path.name for path in (project / "data").rglob("*")} == {"corpus", "shards", "manifest.json"}


def test_a_damaged_footer_is_named_before_any_work(texts: Texts, write_corpus: Callable[[Texts], None]) -> None:
    write_corpus(texts)
    (paths.CORPUS / "test" / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(BadInput, match=r"data/corpus/test/part-00000\.parquet: damaged or truncated"):
        shard(params())
