"""Tokenizers in GGUF: llama.cpp reads texts in the tokens of what went in, and so does what comes out again."""

import json
import unicodedata
from pathlib import Path

import llama_cpp
import odd
import pytest
from gguf_files import IDS, SIZE, edited, make_checkpoint, written
from texts import HARD
from tokenizers import Tokenizer

from lm import gguf_file, gguf_tokenizer, hugging_face
from lm.gguf_tensors import Unfit
from tasks.shard.tokenizer import BytePairTokenizer, train


@pytest.mark.parametrize("pre", gguf_tokenizer.PIECES)
def test_llama_cpp_reads_texts_in_the_same_tokens(pre: str, tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path, pre=pre)
    path = written(folder, "f16")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = [tokenizer.encode(text).ids for text in HARD]
    assert llama_cpp.tokenized(path, HARD) == expected
    content = gguf_file.load(path).tokenizer
    assert content is not None
    assert [Tokenizer.from_str(content).encode(text).ids for text in HARD] == expected


@pytest.mark.parametrize(
    ("name", "pre"), [("deepseek-r1-qwen", "qwen2"), ("llama3", "llama-bpe"), ("llama-v3", "llama-bpe")]
)
def test_llama_cpp_s_other_names_for_a_way_to_cut_texts_are_known(name: str, pre: str, tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path, pre=pre)
    path = edited(written(folder, "f16"), tmp_path / "other.gguf", {"tokenizer.ggml.pre": name})
    content = gguf_file.load(path).tokenizer
    assert content is not None
    assert [Tokenizer.from_str(content).encode(text).ids for text in HARD] == llama_cpp.tokenized(path, HARD)


def test_llama_cpp_reads_texts_in_the_tokens_of_our_own_tokenizer(tmp_path: Path) -> None:
    own = train([*HARD, "and it came to pass, in the 12 days; "], SIZE)
    hugging_face.save(odd.make_grouped(**IDS), write(tmp_path / "tokenizer", own.to_json()), tmp_path)
    expected = [[SIZE - 1, *ids] for ids in own.encode(HARD)]
    assert llama_cpp.tokenized(written(tmp_path), HARD) == expected


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_llama_cpp_and_tiktoken_agree_on_what_is_a_letter_a_digit_and_a_space(tmp_path: Path) -> None:
    # As in tests/tasks/test_shard.py: a merge shows whether a character joined its neighbour's piece.
    ranks = {bytes([byte]): byte for byte in range(256)}
    for neighbour in b"a1! ":
        for lead in range(0x80, 0x100):
            ranks[bytes([neighbour, lead])] = len(ranks)
    probe = BytePairTokenizer(ranks)
    size = {"vocab_size": len(ranks) + 1, "bos_token_id": len(ranks), "eos_token_id": len(ranks)}
    hugging_face.save(odd.make_grouped(**size), write(tmp_path / "tokenizer", probe.to_json()), tmp_path)
    # What Python's Unicode does not know yet, llama.cpp may know or not.
    known = [char for char in map(chr, range(0x80, 0x32000, 5)) if unicodedata.category(char) not in ("Cn", "Cs")]
    texts = ["".join(f"{neighbour}{char}x\n" for char in known) for neighbour in "a1! "]
    expected = [[len(ranks), *ids] for ids in probe.encode(texts)]
    assert llama_cpp.tokenized(written(tmp_path), texts) == expected


def changed(tokenizer: Path, **changes: object) -> str:
    return json.dumps({**json.loads(tokenizer.read_text()), **changes})


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path)
    path = folder / "tokenizer.json"
    other = {"type": "Sequence", "pretokenizers": [gguf_tokenizer.PIECES["llama-bpe"][1]]}
    for content, message in (
        (changed(path, pre_tokenizer=other), "it cuts texts as none of the ways that llama.cpp knows does; known are "),
        (changed(path, normalizer={"type": "Lowercase"}), "it changes texts before it cuts them"),
        ("{}", "it is no tokenizer"),
        ("[]", "it is no tokenizer"),
    ):
        path.write_text(content)
        with pytest.raises(Unfit, match=f"^{path}: {message}"):
            written(folder)


def test_padding_that_a_tokenizer_was_saved_with_is_nothing_that_it_adds_to_a_text(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = [tokenizer.encode(text).ids for text in HARD]
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert llama_cpp.tokenized(written(folder), HARD) == expected


def with_a_token_that_nothing_is_merged_to(folder: Path, ignores: bool) -> str:
    """Has the tokenizer of the checkpoint in ``folder`` hold a word as a token, in the place of another one."""
    path = folder / "tokenizer.json"
    parsed = json.loads(path.read_text())
    last = max(parsed["model"]["vocab"], key=parsed["model"]["vocab"].__getitem__)
    parsed["model"]["vocab"]["qzx"] = parsed["model"]["vocab"].pop(last)
    parsed["model"]["merges"] = [pair for pair in parsed["model"]["merges"] if last not in ("".join(pair), *pair)]
    parsed["model"]["ignore_merges"] = ignores
    path.write_text(json.dumps(parsed))
    return path.read_text()


def test_what_is_a_token_is_taken_whole_where_llama_cpp_does(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path, pre="llama-bpe")
    tokenizer = Tokenizer.from_str(with_a_token_that_nothing_is_merged_to(folder, True))
    path = written(folder)
    texts = ["qzx", "qzx qzx1", "aqzx"]
    expected = [tokenizer.encode(text).ids for text in texts]
    assert len(expected[0]) == 2
    assert llama_cpp.tokenized(path, texts) == expected
    content = gguf_file.load(path).tokenizer
    assert content is not None
    assert [Tokenizer.from_str(content).encode(text).ids for text in texts] == expected


@pytest.mark.parametrize(
    ("pre", "ignores", "message"),
    [
        ("llama-bpe", False, "it reads 'qzx' otherwise than llama.cpp"),
        ("qwen2", True, r"it takes 'qzx' as one token \(ignore_merges\), which llama.cpp does not with 'qwen2'"),
    ],
)
def test_what_llama_cpp_would_take_whole_or_merge_alone_is_refused(
    pre: str, ignores: bool, message: str, tmp_path: Path
) -> None:
    _, folder = make_checkpoint(tmp_path, pre=pre)
    with_a_token_that_nothing_is_merged_to(folder, ignores)
    with pytest.raises(Unfit, match=message):
        written(folder)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_where_a_file_does_not_say_it_bos_is_put_before_a_text_as_by_llama_cpp(pre: str, tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path, pre=pre)
    bare = edited(written(folder), tmp_path / "bare.gguf", {}, ("tokenizer.ggml.add_bos_token",))
    content = gguf_file.load(bare).tokenizer
    assert content is not None
    (ids,) = llama_cpp.tokenized(bare, ["Light"])
    assert Tokenizer.from_str(content).encode("Light").ids == ids
    assert (ids[0] == SIZE - 1) == (pre == "llama-bpe")


def test_bos_is_put_before_a_text_where_its_settings_say_so(tmp_path: Path) -> None:
    # As DeepSeek's, whose tokenizer.json adds none.
    _, folder = make_checkpoint(tmp_path)
    path = folder / "tokenizer.json"
    path.write_text(changed(path, post_processor=None))
    assert llama_cpp.tokenized(written(folder), ["Light"])[0][0] != SIZE - 1
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    assert llama_cpp.tokenized(written(folder), ["Light"])[0][0] == SIZE - 1
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(Unfit, match=r"tokenizer_config\.json: damaged"):
        written(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "{{ messages }}"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ messages }}"})),
    ],
)
def test_a_chat_template_goes_along_wherever_it_stands(file: str, content: str, tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path)
    (folder / file).write_text(content)
    assert gguf_file.load(written(folder)).chat_template == "{{ messages }}"
    (folder / file).write_bytes(b"\xff{")
    with pytest.raises(Unfit, match=f"^{folder / file}: "):
        written(folder)


def test_ids_beyond_the_tokenizer_are_unused_ones(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path, vocab_size=SIZE + 2)
    loaded = gguf_file.load(written(folder))
    assert loaded.config.vocab_size == SIZE + 2
    assert loaded.tokenizer is not None
    assert Tokenizer.from_str(loaded.tokenizer).get_vocab_size() == SIZE


def test_a_file_need_not_say_what_tokens_are_for(tmp_path: Path) -> None:
    _, folder = make_checkpoint(tmp_path)
    bare = edited(written(folder), tmp_path / "bare.gguf", {}, ("tokenizer.ggml.token_type",))
    found = gguf_file.load(bare).tokenizer
    assert found is not None
    read, expected = Tokenizer.from_str(found), Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = f"Light, 1234 lights.{expected.id_to_token(SIZE - 1)}"
    assert read.encode(text).ids == expected.encode(text).ids
    assert read.encode(text).ids[-1] == SIZE - 1
