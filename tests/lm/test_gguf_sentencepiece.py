"""SentencePiece's tokenizers in GGUF: llama.cpp reads texts in the same tokens, and so does what comes out again."""

import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import odd
import pytest
from gguf_files import edited, written
from texts import HARD
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lm import gguf_file, hugging_face
from lm.gguf_tensors import Unfit

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = 350
SIZE = 3 + 256 + PIECES + 1
USER = "<|user|>"
IDS = {"vocab_size": SIZE, "bos_token_id": 1, "eos_token_id": 2}


def pieces() -> list[str]:
    """What a training finds in ``HARD``: single characters, then what it joined, in its order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        [*HARD, "and it came to pass, in the 12 days; "],
        trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=[]),
    )
    found = tokenizer.get_vocab()
    # The other scripts are to be spelled in bytes. Of a NUL, a name in GGUF ends.
    known = [token for token in found if all("\0" < char < "\u0500" or char == "▁" for char in token)]
    return sorted(known, key=lambda token: (len(token) > 1, found[token]))[:PIECES]


def tokenizer_of(found: list[str], adds_space: bool = True, runs: bool = False) -> Tokenizer:
    """As SentencePiece's are converted: all ways to cut a piece in two are listed, in the order of the pieces.

    ``runs`` of spaces come last, all with the same score, as Llama 2's.
    """
    vocab = {token: id_ for id_, token in enumerate([*SPECIAL, *BYTES, *found])}
    cuts = [
        (piece[:place], piece[place:])
        for piece in found
        for place in range(1, len(piece))
        if piece[:place] in vocab and piece[place:] in vocab
    ]
    if runs:
        # As transformers orders what shares a score.
        ordered = [cut for cut in cuts if set("".join(cut)) == {"▁"}]
        others = [cut for cut in cuts if cut not in ordered]
        cuts = [*others, *sorted(ordered, key=lambda cut: (len(cut[0]), len(cut[1])), reverse=True)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=cuts, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = [normalizers.Prepend("▁")] if adds_space else []
    tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(USER, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def checkpoint(tokenizer: Tokenizer, folder: Path, **changes: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer"))
    hugging_face.save(odd.make_grouped(**IDS | changes), folder / "tokenizer", folder)
    return folder


@pytest.fixture(scope="module")
def found() -> list[str]:
    return pieces()


def check(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """llama.cpp, and what comes out of ``path``, read texts as ``tokenizer`` does; returns what comes out."""
    # What is no special token, but added, is one wherever it is spelled.
    texts = [*HARD, f"Light{USER}light {USER} and"]
    expected = [tokenizer.encode(text).ids for text in texts]
    assert expected[-1].count(SIZE - 1) == 2
    assert llama_cpp.tokenized(path, texts) == expected
    content = gguf_file.load(path).tokenizer
    assert content is not None
    read = Tokenizer.from_str(content)
    assert [read.encode(text).ids for text in texts] == expected
    assert [read.decode(ids) for ids in expected] == [tokenizer.decode(ids) for ids in expected]
    return read


@pytest.mark.parametrize("adds_space", [True, False])
def test_llama_cpp_reads_texts_in_the_same_tokens(adds_space: bool, found: list[str], tmp_path: Path) -> None:
    tokenizer = tokenizer_of(found, adds_space)
    path = written(checkpoint(tokenizer, tmp_path))
    read = check(tokenizer, path)
    # With many joined, or it would show nothing; and some spelled.
    tokens = {token for text in HARD for token in tokenizer.encode(text).tokens}
    assert sum(len(token) > 1 and token not in BYTES for token in tokens) > 100
    assert len(tokens & set(BYTES)) > 20
    # Behind a special token, a space is put again.
    text = "Light</s>light <s> and"
    assert read.encode(text).ids == tokenizer.encode(text).ids
    assert 2 in read.encode(text).ids
    # What is written again from what came out is the same file.
    again = tmp_path / "again"
    again.mkdir()
    assert written(checkpoint(read, again)).read_bytes() == path.read_bytes()


def test_runs_of_spaces_may_share_a_score(found: list[str], tmp_path: Path) -> None:
    runs = {"▁" * count for count in range(2, 17)}
    others = [piece for piece in found if piece not in runs]
    known = [*others[: PIECES - len(runs)], *sorted(runs, key=lambda run: len(run) % 7)]
    tokenizer = tokenizer_of(known, runs=True)
    path = written(checkpoint(tokenizer, tmp_path))
    check(tokenizer, path)
    reader = gguf.GGUFReader(path)
    tokens, scores = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    assert len({score for token, score in zip(tokens, scores, strict=True) if token in runs}) < len(runs)
    alike = [-1e9 if token in runs else score for token, score in zip(tokens, scores, strict=True)]
    check(tokenizer, edited(path, tmp_path / "alike.gguf", {"tokenizer.ggml.scores": alike}))


def test_ids_beyond_the_tokenizer_are_unused_ones(found: list[str], tmp_path: Path) -> None:
    path = written(checkpoint(tokenizer_of(found), tmp_path, vocab_size=SIZE + 5))
    assert check(tokenizer_of(found), path).get_vocab_size() == SIZE


def test_what_a_file_does_not_say_is_as_llama_cpp_has_it(found: list[str], tmp_path: Path) -> None:
    path = written(checkpoint(tokenizer_of(found), tmp_path))
    unsaid = ("add_space_prefix", "add_bos_token", "unknown_token_id", "pre")
    bare = edited(path, tmp_path / "bare.gguf", {}, [f"tokenizer.ggml.{key}" for key in unsaid])
    check(tokenizer_of(found), bare)


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(found: list[str], tmp_path: Path) -> None:
    tokenizer = tokenizer_of(found)
    parsed = json.loads(tokenizer.to_str())
    merges = parsed["model"]["merges"]
    last = merges[-1]
    first, always = (
        json.loads(pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False).__getstate__())
        for scheme in ("first", "always")
    )
    user = {**parsed["added_tokens"][-1], "id": SIZE}
    lacks = {token: id_ for token, id_ in parsed["model"]["vocab"].items() if token != "<0x41>"}
    twice = next(pair for pair in merges if sum("".join(other) == "".join(pair) for other in merges) > 1)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        # Not before what stands behind a special token, and not before a text that begins with a space.
        ({"normalizer": None, "pre_tokenizer": first}, "it puts a space before some texts (Metaspace)"),
        ({"normalizer": None, "pre_tokenizer": always}, "it puts a space before some texts (Metaspace); "),
        ({"normalizer": {"type": "Lowercase"}}, "it changes or cuts texts before it looks for pieces"),
        ({"model": {**parsed["model"], "ignore_merges": True}}, "it does not always join pieces in their order"),
        ({"model": {**parsed["model"], "dropout": 0.1}}, "it does not always join pieces in their order"),
        # llama.cpp would join letters to a token that was added, too.
        ({"added_tokens": [*parsed["added_tokens"], {**user, "content": "Lo"}]}, "it does not join 'L' and 'o'"),
        ({"model": {**parsed["model"], "merges": merges[:-1]}}, f"it does not join {last[0]!r} and {last[1]!r}"),
        (
            {"model": {**parsed["model"], "merges": [*(one for one in merges if one != twice), twice]}},
            "it joins ",
        ),
        ({"model": {**parsed["model"], "vocab": lacks}}, "it lacks <0x41>"),
    )
    for number, (changes, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoint(tokenizer, folder)
        (folder / "tokenizer.json").write_text(json.dumps({**parsed, **changes}))
        with pytest.raises(Unfit) as raised:
            written(folder)
        assert str(raised.value).startswith(f"{folder / 'tokenizer.json'}: {message}")


def test_scores_that_leave_an_order_open_are_refused(found: list[str], tmp_path: Path) -> None:
    path = written(checkpoint(tokenizer_of(found), tmp_path))
    reader = gguf.GGUFReader(path)
    tokens, scores = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    spelled = ["\u00fe" if token == "e" else token for token in tokens]
    for changes, without, message in (
        ({"scores": [-1000.0] * SIZE}, (), "scores do not say which is joined first, "),
        ({"scores": [score // 40 * 40 for score in scores]}, (), "scores do not say which is joined first, "),
        ({"scores": [0.0] * (SIZE - 1)}, (), f"scores are {SIZE - 1}, and it has {SIZE} tokens"),
        ({}, ("scores",), "its metadata lack tokenizer.ggml.scores"),
        ({"unknown_token_id": 2**32 - 1}, (), f"unknown_token_id is 4294967295, and it has {SIZE} tokens"),
        # llama.cpp joins what is no piece by itself, and a list of merges cannot.
        ({"tokens": spelled}, (), " is joined of 'e', which is no piece"),
    ):
        other = edited(
            path, tmp_path / "other.gguf", {f"tokenizer.ggml.{name}": value for name, value in changes.items()},
            [f"tokenizer.ggml.{name}" for name in without],
        )  # fmt: skip
        with pytest.raises(Unfit) as raised:
            gguf_file.load(other)
        assert message in str(raised.value)
