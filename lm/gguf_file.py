"""Reads a model from a GGUF file: ours, or one of llama.cpp's converter, in any type that gguf dequantizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType, TokenType

from lm import gguf_sentencepiece
from lm.config import ModelConfig, layers_and_experts
from lm.gguf_config import config_from, told_ends
from lm.gguf_split import files_of
from lm.gguf_tensors import EXPANDED, Array, Part, Unfit, check_names, parts
from lm.gguf_tokenizer import Vocabulary, puts_bos_before, tokenizer_json
from lm.hugging_face import layout_to_state
from lm.model import LanguageModel

_TOKENIZER = "tokenizer.ggml."
_COUNT = "split.count"


class Loaded(NamedTuple):
    """What a GGUF file holds: the model's shape, its fp32 state in :mod:`lm`'s names, and its ``tokenizer.json``.

    ``tokenizer`` is None where the file has none, or one that cuts texts in a way that is not known here;
    ``chat_template`` where it has none. ``ends`` are the tokens that end a text beside the one in ``config``.
    """

    config: ModelConfig
    state: dict[str, torch.Tensor]
    tokenizer: str | None
    chat_template: str | None
    ends: list[int]


def load(path: Path) -> Loaded:
    """Returns the model in ``path``; ``LanguageModel(config).load_state_dict(state)`` takes it.

    Of a model that was split into several files, ``path`` is the first, and the others lie beside it. Raises
    :class:`Unfit` with one line that begins with ``path`` and names what is at fault: no GGUF, an architecture or a
    type of tensors that is not known, tensors that are missing, are too many or have another shape.
    """
    try:
        return _load(path)
    except Unfit as error:
        raise Unfit(f"{path}: {error}") from None


def _load(path: Path) -> Loaded:
    files = files_of(path)
    readers, metadata = zip(*(_opened(file, first=file == path) for file in files), strict=True)
    found = metadata[0]
    for file, own in zip(files, metadata, strict=True):
        if (count := own.get(_COUNT, 1)) != len(files):
            raise Unfit(f"{file.name} says that it is one of {count} parts, and its name says {len(files)}")
    every = [tensor for reader in readers for tensor in reader.tensors]
    there = {tensor.name: tensor for tensor in every}
    if len(there) < len(every):
        raise Unfit("one tensor lies in two of its parts")
    if "token_embd.weight" not in there:
        raise Unfit("it lacks token_embd.weight")
    factors = there.get("rope_freqs.weight")
    config = config_from(
        found,
        _dequantized(there["token_embd.weight"]).shape,
        tied="output.weight" not in there,
        factors=None if factors is None else _dequantized(factors),
        tensors=there,
    )
    # Before they are listed: a small file may say that there are billions.
    least, numbers = layers_and_experts(config), sum(tensor.n_elements for tensor in every)
    if config.num_hidden_layers > len(every) or least > numbers:
        raise Unfit(
            f"its metadata say that it has {least:,} layers and experts, more than its {len(every):,} tensors hold"
        )
    wanted = parts(config, expanded=f"blk.0.{EXPANDED}.weight" in there)
    check_names({name for part in wanted for name in part.names}, there)
    layout = {}
    for part in wanted:
        tensors = _changed(part, [_dequantized(there[name]) for name in part.names])
        for source, tensor in zip(part.sources, tensors, strict=True):
            # A copy: what is not computed lies in the file, which may be replaced.
            layout[source] = torch.from_numpy(np.array(tensor))
    state = layout_to_state(layout)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    _check_shapes(config, state)
    template, ends = found.get("tokenizer.chat_template"), told_ends(found, config.vocab_size)
    return Loaded(config, state, _tokenizer(found, config), template, ends)


def _opened(path: Path, first: bool) -> tuple[gguf.GGUFReader, dict[str, Any]]:
    try:
        reader = _Reader(path)
        return reader, {key: _content(field) for key, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        where = "" if first else f"{path.name}: "
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unfit(f"{where}damaged, or no GGUF file ({reason})") from None


class _Reader(gguf.GGUFReader):
    """Refuses lists that are longer than the file, to whose end gguf would go, and lists of lists, into which it would.

    llama.cpp writes none of either.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            kind, length = self._get(orig_offs, np.uint32)[0], self._get(orig_offs + 4, np.uint64)[0]
            if kind == GGUFValueType.ARRAY:
                raise ValueError("a list of lists in its metadata")
            if length > len(self.data) - orig_offs:
                raise ValueError(f"a list of {length:,} in a file of {len(self.data):,} bytes")
        return super()._get_field_parts(orig_offs, raw_type)


def _content(field: gguf.ReaderField) -> Any:
    content = field.contents()
    # The shortest decimal of the 32 bits: 1e-06 and not 9.999999974752427e-07.
    return float(str(np.float32(content))) if field.types == [GGUFValueType.FLOAT32] else content


def _dequantized(tensor: gguf.ReaderTensor) -> Array:
    try:
        values: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = GGMLQuantizationType(tensor.tensor_type).name
        raise Unfit(f"{tensor.name} is of type {kind}, which cannot be read") from None
    return values


def _changed(part: Part, tensors: list[Array]) -> list[Array]:
    try:
        return part.to_layout(tensors)
    except ValueError:
        raise Unfit(f"{part.names[0]} has another shape than the metadata say") from None


def _check_shapes(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        expected = LanguageModel(config).state_dict()
    for name, tensor in expected.items():
        if (shape := tuple(state[name].shape)) != tuple(tensor.shape):
            raise Unfit(f"{name} would have the shape {shape}; its metadata say {tuple(tensor.shape)}")


def _tokenizer(found: Mapping[str, Any], config: ModelConfig) -> str | None:
    match found.get(f"{_TOKENIZER}model"):
        case "gpt2":
            return tokenizer_json(_vocabulary(found, config), config.bos_token_id)
        case "llama":
            return gguf_sentencepiece.tokenizer_json(_pieces(found, config), config.bos_token_id)
        case _:
            return None


def _vocabulary(found: Mapping[str, Any], config: ModelConfig) -> Vocabulary:
    tokens, types = _tokens(found, config, "merges")
    pre = found.get(f"{_TOKENIZER}pre", "")
    # What is not said is as llama.cpp has it.
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=found[f"{_TOKENIZER}merges"],
        adds_bos=found.get(f"{_TOKENIZER}add_bos_token", puts_bos_before(pre)),
    )


def _pieces(found: Mapping[str, Any], config: ModelConfig) -> gguf_sentencepiece.Pieces:
    tokens, types = _tokens(found, config, "scores")
    unknown = found.get(f"{_TOKENIZER}unknown_token_id", 0)
    if unknown >= len(tokens):
        raise Unfit(f"its {_TOKENIZER}unknown_token_id is {unknown}, and it has {len(tokens):,} tokens")
    return gguf_sentencepiece.Pieces(
        tokens=tokens,
        types=types,
        scores=found[f"{_TOKENIZER}scores"],
        unk_token_id=unknown,
        adds_bos=found.get(f"{_TOKENIZER}add_bos_token", True),
        adds_space=found.get(f"{_TOKENIZER}add_space_prefix", True),
    )


def _tokens(found: Mapping[str, Any], config: ModelConfig, *more: str) -> tuple[list[str], list[int]]:
    """Returns the tokens and their types. Raises :class:`Unfit` where the file lacks them, or ``more``, or a part."""
    for key in ("tokens", *more):
        if f"{_TOKENIZER}{key}" not in found:
            raise Unfit(f"its metadata lack {_TOKENIZER}{key}")
    tokens, ends = found[f"{_TOKENIZER}tokens"], (config.eos_token_id, config.bos_token_id)
    for key, end in zip(("eos_token_id", "bos_token_id"), ends, strict=True):
        if end >= len(tokens):
            raise Unfit(f"its {_TOKENIZER}{key} is {end}, and it has {len(tokens):,} tokens")
    # As in llama.cpp, a file need not say what tokens are for.
    types = [TokenType.CONTROL if number in ends else TokenType.NORMAL for number in range(len(tokens))]
    types = found.get(f"{_TOKENIZER}token_type", types)
    for name, values in (("token_type", types), ("scores", found.get(f"{_TOKENIZER}scores", tokens))):
        if len(values) != len(tokens):
            raise Unfit(f"its {_TOKENIZER}{name} are {len(values):,}, and it has {len(tokens):,} tokens")
    return tokens, types
