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
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# 16 positions at first; DeepSeek scales scores by it, V2 with 0.707.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
V2 = {"model_type": "deepseek_v2", "norm_topk_prob": False}
PROMPTS = torch.randint(0, SIZE - 1, (2, 20), generator=torch.Generator().manual_seed(1)).tolist()
NEW = 20


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


def greedy(model: LanguageModel, prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    """The likeliest token of ``model`` after each prompt and each beginning of its answer."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        likeliest = model(torch.tensor(texts))[:, len(prompts[0]) - 1 : -1].argmax(dim=-1)
    return likeliest.tolist()
