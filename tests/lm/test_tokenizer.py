"""Text as it comes, token by token, with the decoders that checkpoints bring."""

import itertools
import json
from pathlib import Path
from typing import cast

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models

from lm.tokenizer import Detokenizer, read_tokenizer

_PIECES = ["▁In", "▁the", "▁beginning", "God", "▁", ",", "!"]
_SPECIAL = "<s>"


@pytest.fixture
def llama_2() -> Tokenizer:
    """As SentencePiece's are converted: a space before each word, bytes where a character is no piece."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: index for index, piece in enumerate([_SPECIAL, *bytes_, *_PIECES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([_SPECIAL])
    return tokenizer


def ids(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """The tokens of ``pieces``; what is no piece is written in bytes."""
    found = [(tokenizer.token_to_id(one), one) for one in pieces]
    return [
        token
        for known, one in found
        for token in ([known] if known is not None else [1 + byte for byte in one.encode()])
    ]


def texts(tokenizer: Tokenizer, before: list[int], tokens: list[int]) -> list[str]:
    """The text after each of ``tokens``."""
    detokenizer, found = Detokenizer(tokenizer, before), []
    for token in tokens:
        detokenizer.append(token)
        found.append(detokenizer.text)
    return found


WRITTEN = ["▁In", "▁the", _SPECIAL, "▁beginning", "é", "▁", "God", ",", "海", "!"]


@pytest.mark.parametrize("before", [(), ("▁In", "▁the"), ("God", "é"), ("▁In", _SPECIAL), ("海",) * 12], ids=str)
def test_the_text_is_that_of_all_tokens_decoded_at_once(llama_2: Tokenizer, before: tuple[str, ...]) -> None:
    first, tokens = ids(llama_2, *before), ids(llama_2, *WRITTEN)
    whole = llama_2.decode([*first, *tokens])
    found = texts(llama_2, first, tokens)
    assert found[-1] == whole[len(llama_2.decode(first)) :]
    # It grows, and half a character is none.
    assert all(later.startswith(text) and "\ufffd" not in text for text, later in itertools.pairwise(found))
    assert found[0] == (" In" if before else "In")


def test_bytes_that_are_no_character_are_told_once_something_else_follows(llama_2: Tokenizer) -> None:
    found = texts(llama_2, [], [*ids(llama_2, "God"), 1 + 0xE2, 1 + 0x82, *ids(llama_2, "!")])
    assert found == ["God", "God", "God", "God\ufffd\ufffd!"]


def test_of_a_token_with_a_character_and_a_half_the_whole_one_is_told() -> None:
    # "€" is the bytes e2 82 ac, which byte-level vocabularies spell so.
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "!â": 1, "Ĥ": 2, "¬": 3}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    assert texts(tokenizer, [], [0, 1, 2, 3]) == ["a", "a!", "a!", "a!€"]


def test_it_reads_whole_texts_whatever_the_file_was_saved_with(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    assert read_tokenizer(tmp_path / "tokenizer.json").encode("a" * 12, add_special_tokens=False).ids == [*b"a" * 12]


def test_special_tokens_are_not_read_again_with_each_that_follows(llama_2: Tokenizer) -> None:
    longest = 0

    class Noted:
        get_added_tokens_decoder = llama_2.get_added_tokens_decoder

        def decode(self, tokens: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return llama_2.decode(tokens)

    detokenizer = Detokenizer(cast("Tokenizer", Noted()), [])
    for token in ids(llama_2, "▁In", *[_SPECIAL] * 1000, "▁the"):
        detokenizer.append(token)
    assert detokenizer.text == "In the"
    assert longest < 5
