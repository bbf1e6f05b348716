"""A ``tokenizer.json`` with byte-level BPE in the metadata of GGUF, and back. Imports no torch.

llama.cpp does not read how a text is cut into pieces before merging: it knows some ways by name
(``tokenizer.ggml.pre``), each written out in its source. A tokenizer that cuts otherwise cannot be told to it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from lm.gguf_tensors import Unfit

# gguf.TokenType
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_GPT_2 = {**_BYTES, "use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# Letters that have cases, as DeepSeek's first tokenizer has them: single ones, and ranges by their ends.
_CASED = (
    *("A-Z", "a-z", "\u00b5", "\u00c0-\u00d6", "\u00d8-\u00f6", "\u00f8-\u01ba", "\u01bc-\u01bf", "\u01c4-\u0293"),
    *("\u0295-\u02af", "\u0370-\u0373", "\u0376", "\u0377", "\u037b-\u037d", "\u037f", "\u0386", "\u0388-\u038a"),
    *("\u038c", "\u038e-\u03a1", "\u03a3-\u03f5", "\u03f7-\u0481", "\u048a-\u052f", "\u0531-\u0556", "\u10a0-\u10c5"),
    *("\u13a0-\u13f5", "\u13f8-\u13fd", "\u1c90-\u1cba", "\u1cbd-\u1cbf", "\u1d00-\u1d2b", "\u1d6b-\u1d77"),
    *("\u1d79-\u1d9a", "\u1e00-\u1f15", "\u1f18-\u1f1d", "\u1f20-\u1f45", "\u1f48-\u1f4d", "\u1f50-\u1f57"),
    *("\u1f59", "\u1f5b", "\u1f5d", "\u1f5f-\u1f7d", "\u1f80-\u1fb4", "\u1fb6-\u1fbc", "\u1fbe", "\u1fc2-\u1fc4"),
    *("\u1fc6-\u1fcc", "\u1fd0-\u1fd3", "\u1fd6-\u1fdb", "\u1fe0-\u1fec", "\u1ff2-\u1ff4", "\u1ff6-\u1ffc"),
    *("\u2102", "\u2107", "\u210a-\u2113", "\u2115", "\u2119-\u211d", "\u2124", "\u2126", "\u2128", "\u212a-\u212d"),
    *("\u212f-\u2134", "\u2139", "\u213c-\u213f", "\u2145-\u2149", "\u214e", "\u2183", "\u2184", "\u2c00-\u2c7b"),
    *("\u2c7e-\u2ce4", "\u2ceb-\u2cee", "\u2cf2", "\u2cf3", "\ua640-\ua66d", "\ua680-\ua69b", "\ua722-\ua76f"),
    *("\ua771-\ua787", "\ua78b-\ua78e", "\uab70-\uabbf", "\ufb00-\ufb06", "\ufb13-\ufb17", "\uff21-\uff3a"),
    *("\uff41-\uff5a", "\U00010400-\U0001044f", "\U000104b0-\U000104d3", "\U000104d8-\U000104fb"),
    *("\U00010c80-\U00010cb2", "\U00010cc0-\U00010cf2", "\U000118a0-\U000118df", "\U0001e900-\U0001e943"),
)

# By llama.cpp's name, the steps in which the tokenizers of these families cut a text.
PIECES: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": [_split(_CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST), _BYTES],
    "qwen2": [_split(_CONTRACTIONS + _WORDS + r"|\p{N}" + _REST), _BYTES],
    "deepseek-v3": [
        _split(r"\p{N}{1,3}"),
        _split("[一-龥\u3040-ゟ゠-ヿ]+"),
        _split(
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
        ),
        _BYTES,
    ],
    "deepseek-llm": [
        _split("[\r\n]"),
        _split(rf"\s?[{''.join(_CASED)}]+"),
        _split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
        _split(r"\s+$"),
        _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
        {"type": "Digits", "individual_digits": True},
        _BYTES,
    ],
    "deepseek-coder": [
        _split("[\r\n]"),
        _split(r"\s?\p{L}+"),
        _split(r"\s?\p{P}+"),
        _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
        {"type": "Digits", "individual_digits": True},
        _BYTES,
    ],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT_2],
    "gpt-2": [_GPT_2],
}
# Other names for some of them, in files that llama.cpp's converter writes or wrote.
_ALIASES = {"deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}
# With it, llama.cpp takes a piece that is a token as it is, however it would be merged, and puts bos before a text
# where a file does not say whether.
_TAKES_WHOLE = "llama-bpe"

# As Overnight's own tokenizer writes the first of these: it ignores no case, and takes spaces 100,000 at a time.
_OURS = [
    _split(
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        + _WORDS
        + r"|\p{N}{1,3}"
        + _REST.replace(r"\s+(?!", r"\s{1,100000}(?!")
    ),
    _BYTES,
]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF has it: ``tokens`` and their ``types`` by id, ``merges`` in their order."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    adds_bos: bool


def vocabulary(content: str, size: int, bos_token_id: int) -> Vocabulary:
    """Returns the tokenizer ``content`` (a ``tokenizer.json``), filled up to ``size`` ids with unused ones.

    Raises :class:`Unfit` where llama.cpp would read texts in other tokens.
    """
    begins = beginning(content)
    parsed = json.loads(content)
    model = parsed["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise Unfit("it is no byte-level BPE, and nothing else can be told to llama.cpp")
    if any(step["type"] != "NFC" for step in _steps(parsed["normalizer"], "normalizers")):
        raise Unfit("it changes texts before it cuts them (its normalizer), which llama.cpp does not")
    steps = [_essence(step) for step in _steps(parsed["pre_tokenizer"], "pretokenizers")]
    ways = [*PIECES.items(), ("llama-bpe", _OURS)]
    names = [name for name, known in ways if [_essence(step) for step in known] == steps]
    if not names:
        raise Unfit(f"it cuts texts as none of the ways that llama.cpp knows does; known are {', '.join(PIECES)}")
    _check_whole_pieces(model, names[0])
    if not model["merges"]:
        raise Unfit("it merges nothing, and llama.cpp reads no such tokenizer; raise shard.vocab_size")
    tokens, types = filled_up(parsed, size)
    merges = [" ".join(pair) for pair in pairs(model["merges"])]
    return Vocabulary(names[0], tokens, types, merges, adds_bos(begins, bos_token_id))


def pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Returns the merges of a ``tokenizer.json``: pairs since tokenizers 0.20, and strings with a space before."""
    return [(left, right) for left, right in (one.split(" ") if isinstance(one, str) else one for one in merges)]


def puts_bos_before(pre: str) -> bool:
    """Returns whether llama.cpp puts bos before a text for a file that says nothing of it but its ``pre``."""
    return _ALIASES.get(pre, pre) == _TAKES_WHOLE


def _check_whole_pieces(model: Mapping[str, Any], pre: str) -> None:
    """Raises :class:`Unfit` where llama.cpp would take a piece as one token that is merged to others, or vice versa."""
    if bool(model.get("ignore_merges")) == (pre == _TAKES_WHOLE):
        return
    merging = models.BPE(vocab=model["vocab"], merges=pairs(model["merges"]))
    for token in model["vocab"]:
        if len(merging.tokenize(token)) > 1:
            raise Unfit(
                f"it reads {token!r} otherwise than llama.cpp, which with '{pre}' takes what is a token as one"
                if pre == _TAKES_WHOLE
                else f"it takes {token!r} as one token (ignore_merges), which llama.cpp does not with '{pre}'"
            )


def beginning(content: str) -> list[int]:
    """Returns the ids that the ``tokenizer.json`` adds to a text. Raises :class:`Unfit` where it is none."""
    try:
        tokenizer = Tokenizer.from_str(content)
        # What it may have been saved with fills up batches, and is nothing that it adds to a text.
        tokenizer.no_padding()
        return tokenizer.encode("").ids
    except Exception as error:
        # tokenizers has no exception of its own.
        raise Unfit(f"it is no tokenizer ({' '.join(str(error).split())})") from None


def adds_bos(begins: list[int], bos_token_id: int) -> bool:
    """Returns whether ``begins`` is that token. Raises :class:`Unfit` where it is another one."""
    if begins not in ([], [bos_token_id]):
        raise Unfit(f"it adds the ids {begins} to a text; llama.cpp can add bos_token_id, {bos_token_id}, alone")
    return bool(begins)


def filled_up(parsed: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Returns the tokens of a ``tokenizer.json`` and their types by id, with unused ones up to ``size``.

    Raises :class:`Unfit` where it has more.
    """
    added = {token["id"]: token for token in parsed["added_tokens"]}
    by_id = {id_: token for token, id_ in parsed["model"]["vocab"].items()}
    by_id |= {id_: token["content"] for id_, token in added.items()}
    if max(by_id) >= size:
        raise Unfit(f"it has the id {max(by_id)}, and the model's vocab_size is {size}")
    return [by_id.get(id_, f"[PAD{id_}]") for id_ in range(size)], [_type(id_, by_id, added) for id_ in range(size)]


def tokenizer_json(known: Vocabulary, bos_token_id: int) -> str | None:
    """Returns a ``tokenizer.json`` that cuts and merges as ``known`` does; None where its way to cut is not known.

    Raises :class:`Unfit` where merges are of no tokens.
    """
    pieces = PIECES.get(_ALIASES.get(known.pre, known.pre))
    if pieces is None:
        return None
    vocab = {token: id_ for id_, token in enumerate(known.tokens) if known.types[id_] != UNUSED}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in known.merges)]
    try:
        takes_whole = _ALIASES.get(known.pre, known.pre) == _TAKES_WHOLE
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=takes_whole))
    except Exception as error:
        # tokenizers has no exception of its own.
        raise Unfit(f"its tokenizer.ggml.merges are not of its tokens ({' '.join(str(error).split())})") from None
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(known.tokens, known.types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    if known.adds_bos:
        tokenizer.post_processor = putting_before(known.tokens[bos_token_id], bos_token_id)
    parsed = json.loads(tokenizer.to_str())
    parsed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pieces}
    return json.dumps(parsed, indent=2, ensure_ascii=False) + "\n"


def putting_before(bos: str, bos_token_id: int) -> processors.PostProcessor:
    """Returns what puts the token ``bos`` before a text."""
    return processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, bos_token_id)]
    )


def _steps(whole: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if whole is None:
        return []
    return whole[name] if whole["type"] == "Sequence" else [whole]


def _essence(step: Mapping[str, Any]) -> dict[str, Any]:
    # Where pieces begin, and not what is told of them afterwards.
    return {name: value for name, value in step.items() if name != "trim_offsets"}


def _type(id_: int, by_id: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if id_ in added:
        return CONTROL if added[id_]["special"] else USER_DEFINED
    return NORMAL if id_ in by_id else UNUSED
