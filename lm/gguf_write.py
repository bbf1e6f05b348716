"""Writes a checkpoint in Hugging Face layout as one GGUF file, which llama.cpp and what is built on it run.

Imports no torch: weights go through numpy, a part at a time, so that a model need not fit into memory.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from safetensors import SafetensorError, safe_open

from lm import chat_template_files, gguf_sentencepiece
from lm.config import LatentConfig, ModelConfig
from lm.gguf_keys import Value
from lm.gguf_metadata import architecture, further_ends, metadata
from lm.gguf_tensors import Array, Part, Unfit, check_names, parts
from lm.gguf_tokenizer import vocabulary
from lm.hugging_face_config import Unusable, config_from_json
from lm.hugging_face_files import is_of_mtp, read_ends, weight_files

Encoded = npt.NDArray[Any]
Kind = Literal["f32", "f16", "bf16", "q8_0"]
_KINDS: dict[Kind, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}


def write(folder: Path, path: Path, kind: Kind, about: dict[str, str]) -> list[str]:
    """Writes the model in ``folder`` to ``path``, its matrices as ``kind``; equal models give equal bytes.

    Norms, biases and routers stay fp32, as llama.cpp's own converter has it; in ``q8_0``, rows that are no multiple of
    32 long become f16. ``about`` are further metadata, such as general.name. Returns the tokens that end a text and of
    which llama.cpp does not learn: a file has keys for three. Raises :class:`Unfit` that names the file in ``folder``
    that is at fault.
    """
    config = _config(folder / "config.json")
    with _named(folder / "config.json"):
        described = metadata(config)
    try:
        template = chat_template_files.source_in(folder)
        settings = chat_template_files.settings_in(folder)
    except chat_template_files.Malformed as error:
        raise Unfit(str(error)) from None
    writer = gguf.GGUFWriter(path, architecture(config))
    try:
        values = {"general.type": "model", **about, "general.file_type": int(_KINDS[kind][1]), **described}
        _add(writer, values)
        tokens = _add_tokenizer(writer, folder / "tokenizer.json", config, settings.get("add_bos_token") is True)
        untold = _add_ends(writer, folder, config, tokens)
        if template is not None:
            writer.add_chat_template(template[1])
        _write_tensors(writer, folder, config, kind)
    finally:
        writer.close()
    return untold


def check(folder: Path) -> None:
    """Raises :class:`Unfit` that names the file in ``folder`` that is damaged, or lacks or has too many tensors."""
    config = _config(folder / "config.json")
    with _opened(folder, config) as holding:
        check_names({source for part in parts(config) for source in part.sources}, holding)


@contextlib.contextmanager
def _named(path: Path, *faults: type[Exception]) -> Iterator[Path]:
    told: tuple[type[Exception], ...] = (Unfit, *faults)
    try:
        yield path
    except told as error:
        raise Unfit(f"{path}: {' '.join(str(error).split())}") from None


def _config(path: Path) -> ModelConfig:
    with _named(path, ValueError, KeyError):
        return config_from_json(json.loads(path.read_text()))


def _add(writer: gguf.GGUFWriter, values: dict[str, Value]) -> None:
    for key, value in values.items():
        # What only we read keeps all its digits.
        own = key.startswith("overnight.") and isinstance(value, float)
        writer.add_key_value(key, value, GGUFValueType.FLOAT64 if own else _TYPES[type(value)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, path: Path, config: ModelConfig, adds_bos: bool) -> Sequence[str]:
    """Returns the names of the tokens. ``adds_bos``: bos is put before a text, even where the file does not say so."""
    with _named(path, ValueError, KeyError):
        content = path.read_text()
        spells = gguf_sentencepiece.spells_in_bytes(content)
        read = gguf_sentencepiece.pieces if spells else vocabulary
        known = read(content, config.vocab_size, config.bos_token_id)
    if isinstance(known, gguf_sentencepiece.Pieces):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(known.scores)
        writer.add_unk_token_id(known.unk_token_id)
        writer.add_add_space_prefix(known.adds_space)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(known.pre)
        writer.add_token_merges(known.merges)
    writer.add_token_list(known.tokens)
    writer.add_token_types(known.types)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.eos_token_id)
    writer.add_add_bos_token(known.adds_bos or adds_bos)
    writer.add_add_eos_token(False)
    return known.tokens


def _add_ends(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig, tokens: Sequence[str]) -> list[str]:
    """Adds what ends a text beside eos; returns the names of those tokens that a file has no room for."""
    with _named(folder, Unusable):
        ends = further_ends(read_ends(folder), config.eos_token_id, tokens)
    if ends.eot is not None:
        writer.add_eot_token_id(ends.eot)
    if ends.eom is not None:
        writer.add_eom_token_id(ends.eom)
    return [tokens[end] for end in ends.untold]


@contextlib.contextmanager
def _opened(folder: Path, config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yields, for each tensor of the model in ``folder``, the open file that holds it."""
    with _named(folder, Unusable):
        paths = weight_files(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_named(paths[0] if len(paths) == 1 else folder, SafetensorError))
        files = [stack.enter_context(safe_open(path, framework="numpy")) for path in paths]
        # llama.cpp has no use for multi-token prediction.
        depths = config.num_nextn_predict_layers if isinstance(config, LatentConfig) else 0
        held = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        yield {name: file for name, file in held.items() if not is_of_mtp(name, config.num_hidden_layers, depths)}


def _write_tensors(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig, kind: Kind) -> None:
    wanted = parts(config)
    with _opened(folder, config) as holding:
        check_names({source for part in wanted for source in part.sources}, holding)
        for part in wanted:
            # GGUF tells all shapes before the first tensor.
            shapes = [np.ones(holding[source].get_slice(source).get_shape(), np.float32) for source in part.sources]
            for name, tensor in zip(part.names, _changed(part, shapes), strict=True):
                _announce(writer, name, tensor.shape, _kind_of(part, name, tensor.shape, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in wanted:
            tensors = _changed(part, [holding[source].get_tensor(source).astype(np.float32) for source in part.sources])
            for name, tensor in zip(part.names, tensors, strict=True):
                _write_whole(writer, _encoded(name, tensor, _kind_of(part, name, tensor.shape, kind)))


def _write_whole(writer: gguf.GGUFWriter, tensor: Encoded) -> None:
    assert writer.fout is not None
    (file,) = writer.fout
    # The library leaves it to numpy, which on a full disk says nothing, or how much is missing but not why.
    end = writer.ggml_pad(writer.ggml_pad(file.tell(), writer.data_alignment) + tensor.nbytes, writer.data_alignment)
    try:
        writer.write_tensor_data(tensor)
        file.flush()
    except OSError as error:
        if error.errno is not None:
            raise
    if os.fstat(file.fileno()).st_size < end:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def _changed(part: Part, tensors: Sequence[Array]) -> list[Array]:
    try:
        return part.to_gguf(tensors)
    except Unfit:
        raise
    except ValueError:
        raise Unfit(f"{part.sources[0]} has not the shape that config.json says") from None


def _kind_of(part: Part, name: str, shape: Sequence[int], kind: Kind) -> GGMLQuantizationType:
    if len(shape) == 1 or name in part.in_float:
        return GGMLQuantizationType.F32
    wanted, _ = _KINDS[kind]
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _announce(writer: gguf.GGUFWriter, name: str, shape: Sequence[int], kind: GGMLQuantizationType) -> None:
    rows = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, rows, np.dtype(np.uint8), int(np.prod(rows)), kind)


def _encoded(name: str, tensor: Array, kind: GGMLQuantizationType) -> Encoded:
    tensor = np.ascontiguousarray(tensor)
    with np.errstate(over="ignore"):
        encoded = gguf.quants.quantize(tensor, kind)
    if kind == GGMLQuantizationType.F16 and np.isinf(encoded).any():
        raise Unfit(f"{name} has numbers beyond 65,504, the largest in f16; bf16 holds them")
    return encoded
