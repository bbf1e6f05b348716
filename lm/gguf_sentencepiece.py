"""A ``tokenizer.json`` with pieces as SentencePiece has them in the metadata of GGUF, and back. Imports no torch.

Llama 2 reads texts so, and what came of it. llama.cpp joins any two neighbours that are a piece together, those first
whose piece has the highest score. A ``tokenizer.json`` lists which two are joined, in their order: all ways to cut a
piece in two, piece by piece from the highest score down, come to the same.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from lm.gguf_tensors import Unfit
from lm.gguf_tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    adds_bos,
    beginning,
    filled_up,
    pairs,
    putting_before,
)

# gguf.TokenType
_UNKNOWN, _BYTE = 2, 6
_SPACE = "\u2581"
_BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


@dataclass(frozen=True)
class Pieces:
    """A tokenizer as GGUF has it: ``tokens``, their ``types`` and ``scores`` by id.

    ``adds_space``: before a text, and before what follows a special token.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    unk_token_id: int
    adds_bos: bool
    adds_space: bool


def spells_in_bytes(content: str) -> bool:
    """Returns whether the ``tokenizer.json`` spells in bytes what is no piece, as those do that were converted.

    Raises :class:`Unfit` where it is none.
    """
    beginning(content)
    model = json.loads(content)["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def pieces(content: str, size: int, bos_token_id: int) -> Pieces:
    """Returns the tokenizer ``content`` (a ``tokenizer.json``), filled up to ``size`` ids with unused ones.

    Raises :class:`Unfit` where llama.cpp would read texts in other tokens.
    """
    begins = beginning(content)
    parsed = json.loads(content)
    model = parsed["model"]
    vocab: dict[str, int] = model["vocab"]
    if missing := [byte for byte in _BYTES if byte not in vocab]:
        raise Unfit(f"it lacks {missing[0]}, with which llama.cpp spells what is no piece")
    if model["unk_token"] not in vocab:
        raise Unfit("it has no token for what is unknown, which llama.cpp needs")
    scores = _scores(vocab, model, {token["content"] for token in parsed["added_tokens"]})
    tokens, types = filled_up(parsed, size)
    for token in _BYTES:
        types[vocab[token]] = _BYTE
    unknown = vocab[model["unk_token"]]
    types[unknown] = _UNKNOWN
    # Nothing is joined to the others; llama.cpp wants a number all the same.
    return Pieces(
        tokens=tokens,
        types=types,
        scores=[scores.get(token, 0.0) for token in tokens],
        unk_token_id=unknown,
        adds_bos=adds_bos(begins, bos_token_id),
        adds_space=_adds_space(parsed),
    )


def _adds_space(parsed: Mapping[str, Any]) -> bool:
    """Returns whether a space is put before texts. Raises :class:`Unfit` where llama.cpp would not read them so."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = {"type": "Prepend", "prepend": _SPACE}
    if parsed["pre_tokenizer"] is None:
        match parsed["normalizer"]:
            case {"type": "Sequence", "normalizers": steps} if steps == [before, spaces]:
                return True
            case {"type": "Sequence", "normalizers": [step]} | step if step == spaces:
                return False
    match parsed["pre_tokenizer"]:
        case {"type": "Metaspace", "prepend_scheme": "first" | "always"}:
            raise Unfit("it puts a space before some texts (Metaspace); llama.cpp does before all or none")
        case _:
            raise Unfit("it changes or cuts texts before it looks for pieces, otherwise than llama.cpp does")


def _scores(vocab: Mapping[str, int], model: Mapping[str, Any], added: set[str]) -> dict[str, float]:
    """Returns the score of each piece that others are joined to, by which llama.cpp joins them in the same order."""
    if model.get("ignore_merges") or model.get("dropout"):
        raise Unfit("it does not always join pieces in their order (ignore_merges, dropout), which llama.cpp does")
    merges = pairs(model["merges"])
    listed: dict[str, set[tuple[str, str]]] = {}
    for merge in merges:
        listed.setdefault("".join(merge), set()).add(merge)
    for token in [token for token in (*vocab, *sorted(added - vocab.keys())) if token not in _BYTES]:
        if more := [pair for pair in _cuts(token, vocab) if pair not in listed.get(token, ())]:
            left, right = more[0]
            raise Unfit(f"it does not join {left!r} and {right!r}, as llama.cpp would, since {token!r} is a piece")
    scores: dict[str, float] = {}
    for place, together in enumerate(_stretches(merges), start=1):
        # Runs of one character, as of spaces, come to the same whichever of them is first.
        if len(together) > 1 and len({char for joined in together for char in joined}) > 1:
            first, second, *_ = sorted(together)
            raise Unfit(f"it joins {first!r} now before and now behind {second!r}; llama.cpp knows one score of each")
        scores |= dict.fromkeys(together, float(-place))
    return scores


def _stretches(merges: Sequence[tuple[str, str]]) -> Iterator[set[str]]:
    """Yields what is joined, in order; together what is joined now before and now behind something else of it."""
    last = {"".join(merge): place for place, merge in enumerate(merges)}
    together: set[str] = set()
    end = -1
    for place, merge in enumerate(merges):
        if place > end and together:
            yield together
            together = set()
        together.add("".join(merge))
        end = max(end, last["".join(merge)])
    if together:
        yield together


def _cuts(token: str, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    # Single characters are there even where they are no pieces.
    for place in range(1, len(token)):
        left, right = token[:place], token[place:]
        if (left in vocab or len(left) == 1) and (right in vocab or len(right) == 1):
            yield left, right


def tokenizer_json(known: Pieces, bos_token_id: int) -> str:
    """Returns a ``tokenizer.json`` that reads texts as llama.cpp does with ``known``.

    Raises :class:`Unfit` where that would take more than an order of what is joined.
    """
    vocab = {token: id_ for id_, token in enumerate(known.tokens) if known.types[id_] != UNUSED}
    joined = {
        token: found
        for token, id_ in vocab.items()
        if known.types[id_] == NORMAL and (found := _joined_of(token, vocab))
    }
    _check_order({token: known.scores[vocab[token]] for token in joined})
    merges = [(*pair, known.scores[vocab[token]]) for token, found in joined.items() for pair in found]
    # As transformers orders them where scores are equal, as those of runs of spaces are.
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for left, right, _ in merges],
            unk_token=known.tokens[known.unk_token_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    before = [normalizers.Prepend(_SPACE)] if known.adds_space else []
    tokenizer.normalizer = normalizers.Sequence([*before, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if known.adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_tokens(list(_added(known)))
    if known.adds_bos:
        tokenizer.post_processor = putting_before(known.tokens[bos_token_id], bos_token_id)
    return str(tokenizer.to_str(pretty=True)) + "\n"


def _check_order(scores: Mapping[str, float]) -> None:
    """Raises :class:`Unfit` where pieces have one score: llama.cpp joins the leftmost first, which no order tells."""
    alike: dict[float, str] = {}
    for token, score in scores.items():
        other = alike.setdefault(score, token)
        # Runs of one character come to the same.
        if len({*token, *other}) > 1 and token != other:
            raise Unfit(f"its tokenizer.ggml.scores do not say which is joined first, {other!r} or {token!r}")


def _joined_of(token: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    if token in _BYTES:
        return []
    found = list(_cuts(token, vocab))
    if lacking := [part for pair in found for part in pair if part not in vocab]:
        raise Unfit(f"{token!r} is joined of {lacking[0]!r}, which is no piece")
    return found


def _added(known: Pieces) -> Iterator[AddedToken]:
    for token, kind in zip(known.tokens, known.types, strict=True):
        if kind in (CONTROL, USER_DEFINED, _UNKNOWN):
            yield AddedToken(token, normalized=False, special=kind != USER_DEFINED)
