"""Checkpoints in Hugging Face layout: ``config.json``, weights in safetensors, tokenizer files.

:mod:`lm.hugging_face_layout` says which tensor is which. Weights lie in ``model.safetensors``, or in several files that
``model.safetensors.index.json`` names; those in FP8 are widened (:mod:`lm.fp8`). They are read where they are needed,
and written one file after the other. Nothing is unpickled.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from lm import fp8
from lm.config import LatentConfig, ModelConfig, layers_and_experts
from lm.hugging_face_config import Block, Unusable, block_of, config_from_json, config_to_json
from lm.hugging_face_files import (
    CONFIG,
    GENERATION,
    WEIGHTS,
    companions,
    is_of_mtp,
    read_config,
    read_ends,
    read_json,
    system_is_told,
    weight_files,
)
from lm.hugging_face_layout import Piece, copies_of, layout_to_state, pieces_of, state_to_layout
from lm.model import LanguageModel
from lm.weights import Region, Weights, Whole, fill, held_by, on_meta, shapes, whole_region, with_buffers

# Larger weights are written as several files, with an index.
BYTES_A_FILE = 5_000_000_000
_TYPES = {"F64", "F32", "F16", "BF16"}
_NAMES_TOLD = 3

__all__ = [
    "BYTES_A_FILE",
    "Unusable",
    "check",
    "config_from_json",
    "config_to_json",
    "layout_to_state",
    "load",
    "mapped",
    "opened",
    "save",
    "save_companions",
    "save_weights",
    "state_to_layout",
]


class _Tensor(NamedTuple):
    """A tensor on disk, its type as safetensors calls it."""

    file: str
    shape: list[int]
    type: str


class _Files:
    """All tensors of a checkpoint's files, which stay open."""

    def __init__(self, folder: Path) -> None:
        self.config = read_json(folder / CONFIG)
        self.block = block_of(self.config)
        self.names = [path.name for path in weight_files(folder)]
        self.tensors: dict[str, _Tensor] = {}
        self._files = {name: _opened(folder / name) for name in self.names}
        for file_name, file in self._files.items():
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                self.tensors[name] = _Tensor(file_name, part.get_shape(), part.get_dtype())

    def read(self, name: str, region: Region) -> torch.Tensor:
        """Returns that part of the tensor ``name``, perhaps a view of the file, in the type that it has there."""
        tensor = self.tensors[name]
        file = self._files[tensor.file]
        if tensor.type == fp8.TYPE and self.block is not None:
            # Not always in the file of their weights.
            scales = self._files[self.tensors[fp8.scale_name(name)].file].get_slice(fp8.scale_name(name))
            around = fp8.blocks_around(region, tensor.shape, self.block)
            weight = file.get_slice(name)[around.weight]
            return fp8.widened(weight, scales[around.scales], self.block)[around.inner]
        found: torch.Tensor = file.get_slice(name)[region]
        return found


_ReadPieces = Callable[[_Files, list[Piece], Region], torch.Tensor]


def opened(folder: Path, mtp: bool = False) -> tuple[LanguageModel, Weights]:
    """Returns the model in ``folder`` on ``meta``, and its weights, to be read where they are needed.

    In fp32, whatever type they have on disk. ``mtp`` and what is raised are as of :func:`check`.
    """
    model, files = _built(folder, mtp)
    return with_buffers(model), _weights(model, files, _read)


def check(folder: Path, mtp: bool = False) -> ModelConfig:
    """Returns the configuration of the checkpoint in ``folder`` whose weights fit it, without reading their numbers.

    With ``mtp`` the layers of multi-token prediction belong to the model, where the checkpoint has them; only training
    has a use for them. Raises :class:`Unusable` that names the tensors that are missing, surplus, or of another shape
    or type. Numbers are read of a head alone that is said to be the embedding, where it is stored as well.
    """
    model, files = _built(folder, mtp)
    if model.config.tie_word_embeddings:
        _check_tied(files)
    return model.config


def _check_tied(files: _Files) -> None:
    pair = [name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in files.tensors]
    if len(pair) == 2:
        head, embedding = (files.read(name, whole_region(files.tensors[name].shape)) for name in pair)
        if not torch.equal(head.float(), embedding.float()):
            raise Unusable(
                f"{CONFIG}: tie_word_embeddings is true, and the files hold an lm_head.weight that is not "
                "model.embed_tokens.weight; set it to false, or remove that tensor"
            )


def load(folder: Path, mtp: bool = False) -> LanguageModel:
    """Returns the model in ``folder``, in fp32 on the CPU, whatever type its weights have. ``mtp`` and what is raised
    are as of :func:`check`.
    """
    model, weights = opened(folder, mtp)
    fill(model, weights)
    return model


def mapped(folder: Path) -> LanguageModel:
    """Returns what :func:`load` does, to be read: weights that lie in a file as they are computed with stay there.

    Processes that have them share them, and where memory is short the system lets go of them. What is not fp32, and
    experts, whose matrices lie apart, are copies, and so is all that goes to another device. The file may be replaced,
    and may not be written into: a disk that fails to give it ends the process by a signal.
    """
    model, files = _built(folder)
    fill(with_buffers(model), _weights(model, files, _where_it_lies))
    return model


def save(
    model: LanguageModel, tokenizer: Path, folder: Path, origin: Path | None = None, bytes_a_file: int = BYTES_A_FILE
) -> None:
    """Writes ``model`` and a copy of the file ``tokenizer`` into ``folder``; equal models give equal bytes.

    ``origin`` is as of :func:`save_companions`.
    """
    save_weights(model.config, held_by(model), folder, bytes_a_file)
    save_companions(model.config, tokenizer, folder, origin)


def save_weights(config: ModelConfig, whole: Whole, folder: Path | None, bytes_a_file: int = BYTES_A_FILE) -> None:
    """Writes a model's weights, asking ``whole`` for one after the other, and holding no more than a file's.

    Without a ``folder`` it asks for the same ones in the same order, and writes nothing.
    """
    model = on_meta(config)
    state, copies = model.state_dict(), copies_of(model)
    places: dict[str, tuple[str, Piece]] = {}
    for source, pieces in pieces_of(model).items():
        again = [Piece(name, whole_region(state[source].shape), False) for name, own in copies.items() if own == source]
        places |= {piece.name: (source, piece) for piece in [*pieces, *again]}
    shapes = {name: torch.empty_like(piece.of(state[source])) for name, (source, piece) in places.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=bytes_a_file)
    # The matrices of a stack follow each other, and so do copies.
    last = functools.lru_cache(maxsize=1)(whole)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            source, piece = places[name]
            tensor = piece.of(last(source))
            # safetensors takes no two names for one tensor.
            tensors[name] = tensor.clone() if name in copies else tensor.contiguous()
        if folder is not None:
            with system_is_told(folder / file):
                save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded and folder is not None:
        index = {"metadata": {"total_size": split.metadata["total_size"]}, "weight_map": split.tensor_to_filename}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_companions(
    config: ModelConfig, tokenizer: Path, folder: Path, origin: Path | None = None, answer_ends: Sequence[int] = ()
) -> None:
    """Writes all of a checkpoint but its weights, with a copy of the file ``tokenizer``.

    ``origin`` is the folder of the checkpoint that it was trained from: what lies there about the tokenizer, the
    template of a chat and the way to generate is kept as it is. Only ``answer_ends``, the tokens by which it was taught
    to end an answer, are added to what ends a text, where they are missing: a base model's template may write others.
    Without an ``origin``, they are added to the configuration's.
    """
    # Some name several ends, of which a model's shape has the first. What fills up batches stays the checkpoint's own:
    # transformers keeps gradients from it, and the end of a text needs them.
    kept = {} if origin is None else read_json(origin / CONFIG)
    ends, pad = kept.get("eos_token_id"), config.eos_token_id if origin is None else kept.get("pad_token_id")
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends if isinstance(ends, list) else config.eos_token_id,
        "pad_token_id": pad,
    }
    for name, content in {
        "config.json": {**config_to_json(config), "pad_token_id": pad},
        "generation_config.json": {"_from_model_config": True, **ids},
        "tokenizer_config.json": _tokenizer_config(tokenizer, config),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    if origin is not None:
        for beside in companions(origin):
            (folder / beside).parent.mkdir(exist_ok=True)
            (folder / beside).write_bytes((origin / beside).read_bytes())
    known = ([] if origin is None else read_ends(origin)) or [config.eos_token_id]
    more = [end for end in dict.fromkeys(answer_ends) if end not in known]
    generation = read_json(folder / GENERATION)
    # Also where the origin names several in its configuration alone, and has a way to generate that names none.
    if more or (len(known) > 1 and not generation.get("eos_token_id")):
        (folder / GENERATION).write_text(json.dumps({**generation, "eos_token_id": [*known, *more]}, indent=2) + "\n")


def _weights(model: LanguageModel, files: _Files, read: _ReadPieces) -> Weights:
    for name, pieces in pieces_of(model).items():
        yield name, functools.partial(read, files, pieces)


def _where_it_lies(files: _Files, pieces: list[Piece], region: Region) -> torch.Tensor:
    only = pieces[0]
    if len(pieces) > 1 or files.tensors[only.name].type != "F32":
        return _read(files, pieces, region)
    return files.read(only.name, region)


def _read(files: _Files, pieces: list[Piece], region: Region) -> torch.Tensor:
    # A copy, to be written into.
    found = torch.empty([part.stop - part.start for part in region])
    for piece in pieces:
        if (both := piece.shared(region)) is not None:
            here, there = both
            place = found[there]
            place.copy_(files.read(piece.name, here).view_as(place))
    return found


def left_out(folder: Path) -> int:
    """Returns how many tensors of the checkpoint in ``folder`` are of layers that predict further tokens."""
    files = _Files(folder)
    config = config_from_json(files.config)
    depths = config.num_nextn_predict_layers if isinstance(config, LatentConfig) else 0
    return sum(is_of_mtp(name, config.num_hidden_layers, depths) for name in files.tensors)


def _built(folder: Path, mtp: bool = False) -> tuple[LanguageModel, _Files]:
    """Returns the model in ``folder``, shapes alone, and the files with its weights, which fit it."""
    config = read_config(folder)
    files = _Files(folder)
    config = _with_depths(config, files.tensors, mtp)
    # Before they are built: a small file may say that there are billions.
    if (least := layers_and_experts(config)) > len(files.tensors):
        raise Unusable(
            f"{CONFIG}: it has {least:,} layers and experts, more than the {len(files.tensors):,} tensors of "
            f"{_told(files)}; take the one that belongs to these weights"
        )
    model = shapes(config)
    _check_weights(model, files)
    return model, files


def _with_depths(config: ModelConfig, there: Mapping[str, _Tensor], mtp: bool) -> ModelConfig:
    depths = config.num_nextn_predict_layers if isinstance(config, LatentConfig) else 0
    # transformers passes these layers over, and what it writes says that they are there.
    if not depths or (mtp and any(is_of_mtp(name, config.num_hidden_layers, depths) for name in there)):
        return config
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Unusable(f"{path.name}: damaged, or no safetensors ({error})") from None


def _check_weights(model: LanguageModel, files: _Files) -> None:
    state, found = model.state_dict(), files.tensors
    wanted = {
        piece.name: list(piece.of(state[name]).shape) for name, pieces in pieces_of(model).items() for piece in pieces
    }
    scales: set[str] = set()
    for name, tensor in found.items():
        if name not in wanted:
            continue
        if tensor.shape != wanted[name]:
            raise Unusable(f"{tensor.file}: {name} is {tensor.shape}; config.json makes it {wanted[name]}")
        if tensor.type == fp8.TYPE and files.block is not None:
            scales.add(_check_scale(name, found, files.block))
        elif tensor.type not in _TYPES:
            raise Unusable(f"{tensor.file}: {name} is {tensor.type}; weights of floating point are needed")
    what = _told(files)
    if missing := sorted(wanted.keys() - found.keys()):
        raise Unusable(f"{what}: without {_names(missing)}, which a {model.config.model_type} of this config.json has")
    more = int(files.config.get("num_nextn_predict_layers") or 0)
    others = found.keys() - wanted.keys() - scales
    if surplus := sorted(name for name in others if not _is_passed_over(name, model.config, more)):
        raise Unusable(f"{what}: a {model.config.model_type} of this config.json has no {_names(surplus)}")


def _check_scale(weight: str, found: Mapping[str, _Tensor], block: Block) -> str:
    """Returns the name of the scales of ``weight``, which is of FP8."""
    name, of_weight = fp8.scale_name(weight), found[weight]
    if len(of_weight.shape) != fp8.DIMENSIONS:
        raise Unusable(f"{of_weight.file}: {weight} is {of_weight.type} and no matrix; matrices alone have blocks")
    if (scales := found.get(name)) is None:
        raise Unusable(f"{of_weight.file}: {weight} is {of_weight.type}, and there is no {name}")
    if scales.type not in _TYPES:
        raise Unusable(f"{scales.file}: {name} is {scales.type}; scales of {', '.join(sorted(_TYPES))} are read")
    if scales.shape != (shape := fp8.scale_shape(of_weight.shape, block)):
        raise Unusable(f"{scales.file}: {name} is {scales.shape}; blocks of {block[0]} x {block[1]} make it {shape}")
    return name


def _is_passed_over(name: str, config: ModelConfig, more: int) -> bool:
    """Whether the tensor ``name`` is one that the model has no use for, though it belongs to the checkpoint."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name in ("lm_head.weight", fp8.scale_name("lm_head.weight")):
        return config.tie_word_embeddings
    # DeepSeek-V3's layers of multi-token prediction, where they are not trained.
    return is_of_mtp(name, config.num_hidden_layers, more)


def _told(files: _Files) -> str:
    return files.names[0] if len(files.names) == 1 else f"{len(files.names)} files of weights"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_TOLD:,} more" if len(names) > _NAMES_TOLD else ""
    return ", ".join(names[:_NAMES_TOLD]) + more


def _tokenizer_config(tokenizer: Path, config: ModelConfig) -> dict[str, Any]:
    tokens = Tokenizer.from_file(str(tokenizer))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens.id_to_token(config.bos_token_id),
        "eos_token": (end := tokens.id_to_token(config.eos_token_id)),
        "pad_token": end,
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
