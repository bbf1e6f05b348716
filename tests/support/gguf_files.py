"""Small models as GGUF files, and such files with something else in them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import odd
import torch
from gguf.constants import GGUFValueType
from texts import write_trained_tokenizer

from lm import gguf_tokenizer, gguf_write, hugging_face
from lm.model import LanguageModel

SIZE = 330
IDS = {"vocab_size": SIZE, "bos_token_id": SIZE - 1, "eos_token_id": SIZE - 1}


def make_checkpoint(folder: Path, make=odd.make_grouped, pre="llama-bpe", **changes) -> tuple[LanguageModel, Path]:
    model = make(**{**IDS, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter *= torch.linspace(0.5, 1.5, len(parameter))
    write_trained_tokenizer(folder / "tokenizer", gguf_tokenizer.PIECES[pre], SIZE)
    hugging_face.save(model, folder / "tokenizer", folder)
    return model, folder


def written(folder: Path, kind: gguf_write.Kind = "f32") -> Path:
    path = folder / f"{kind}.gguf"
    gguf_write.write(folder, path, kind, {"general.name": "tiny"})
    return path


def split(source: Path, path: Path, parts: int = 3) -> list[Path]:
    """Writes a GGUF file again as ``parts`` files, as llama.cpp's converter does; returns them in order."""
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=-(-len(reader.tensors) // parts))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, sub = field.types[0], field.types[-1]
            writer.add_key_value(key, field.contents(), kind, sub if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def edited(
    source: Path,
    path: Path,
    values: dict[str, object],
    without: Collection[str] = (),
    drop: Collection[str] = (),
    add: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Path:
    """Copies a GGUF file with other metadata and ``without`` some, without the tensors ``drop`` and with some more."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(
        path, str(values.pop("general.architecture", reader.fields["general.architecture"].contents()))
    )
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *without):
            kind, sub = field.types[0], field.types[-1]
            value = values.get(key, field.contents())
            writer.add_key_value(key, value, kind, sub if len(field.types) > 1 else None)
    for key in values.keys() - reader.fields.keys():
        value = values[key]
        writer.add_key_value(key, value, GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.STRING)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, tensor in add.items():
        writer.add_tensor(name, tensor)
    finish(writer)
    return path
