"""Checkpoints in Hugging Face layout: ``config.json``, weights in safetensors, tokenizer files.

On disk each expert has its own three matrices; in memory they are stacked. A head that is tied to the embedding is not
on disk. Layers of multi-token prediction follow the last one, each with a copy of embedding and head. All other tensors
have one name in both. Weights lie in ``model.safetensors``, or in several files that
``model.safetensors.index.json`` names; those in FP8 are widened (:mod:`lm.fp8`). Nothing is unpickled.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lm import fp8
from lm.config import LatentConfig, ModelConfig
from lm.hugging_face_config import Block, Unusable, block_of, config_from_json, config_to_json
from lm.hugging_face_files import COMPANIONS, CONFIG, WEIGHTS, is_of_mtp, read_config, read_json, weight_files
from lm.model import LanguageModel

# Larger weights are written as several files, with an index.
BYTES_A_FILE = 5_000_000_000
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_MTP = re.compile(r"mtp\.(\d+)\.(.*)")
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
    "save",
    "state_to_layout",
]


class _Tensor(NamedTuple):
    """A tensor on disk, its type as safetensors calls it."""

    file: str
    shape: list[int]
    type: str


def state_to_layout(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of ``state`` under the names of the layout, experts one by one, each a view."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            for index, both in enumerate(tensor):
                gate, up = both.chunk(2)
                prefix = f"{name.removesuffix('.gate_up_proj')}.{index}"
                tensors[f"{prefix}.gate_proj.weight"], tensors[f"{prefix}.up_proj.weight"] = gate, up
        elif name.endswith(".mlp.experts.down_proj"):
            for index, down in enumerate(tensor):
                tensors[f"{name.removesuffix('.down_proj')}.{index}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return tensors


def layout_to_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of the layout under the names of :class:`LanguageModel`, experts stacked."""
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
        else:
            state[name] = tensor
    for prefix, parts in experts.items():
        ordered = [parts[index] for index in range(len(parts))]
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([part["gate"], part["up"]]) for part in ordered])
        state[f"{prefix}.down_proj"] = torch.stack([part["down"] for part in ordered])
    return state


def save(
    model: LanguageModel, tokenizer: Path, folder: Path, origin: Path | None = None, bytes_a_file: int = BYTES_A_FILE
) -> None:
    """Writes ``model`` and a copy of the file ``tokenizer`` into ``folder``; equal models give equal bytes.

    ``origin`` is the folder of the checkpoint that it was trained from: what lies there about the tokenizer, the
    template of a chat and the way to generate is kept as it is.
    """
    config = model.config
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (_on_disk(model) | _copies(model)).items()}
    _save_weights(tensors, folder, bytes_a_file)
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.eos_token_id,
    }
    for name, content in {
        "config.json": config_to_json(config),
        "generation_config.json": {"_from_model_config": True, **ids},
        "tokenizer_config.json": _tokenizer_config(tokenizer, config),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    if origin is not None:
        for name in COMPANIONS:
            if (origin / name).is_file():
                (folder / name).write_bytes((origin / name).read_bytes())


def check(folder: Path, mtp: bool = False) -> ModelConfig:
    """Returns the configuration of the checkpoint in ``folder`` whose weights fit it, without reading their numbers.

    With ``mtp`` the layers of multi-token prediction belong to the model, where the checkpoint has them; only training
    has a use for them. Raises :class:`Unusable` that names the tensors that are missing, surplus, or of another shape
    or type.
    """
    config = _config_of(folder, mtp)
    with torch.device("meta"):
        model = LanguageModel(config)
    _check_weights(model, folder)
    return config


def load(folder: Path, mtp: bool = False) -> LanguageModel:
    """Returns the model in ``folder``, in fp32 on the CPU, whatever type its weights have. ``mtp`` and what is raised
    are as of :func:`check`.
    """
    model = LanguageModel(_config_of(folder, mtp))
    _check_weights(model, folder)
    places, block = _on_disk(model), block_of(read_json(folder / CONFIG))
    scales = _scales(folder) if block else {}
    for file, _ in _opened(weight_files(folder)):
        for name in sorted(places.keys() & set(file.keys())):
            tensor = file.get_tensor(name)
            if block and tensor.dtype == torch.float8_e4m3fn:
                tensor = fp8.widened(tensor, scales[fp8.scale_name(name)], block)
            places[name].copy_(tensor)
    return model


def _scales(folder: Path) -> dict[str, torch.Tensor]:
    # Not always in the file of their weights.
    return {
        name: file.get_tensor(name)
        for file, _ in _opened(weight_files(folder))
        for name in file.keys()  # noqa: SIM118
        if fp8.is_scale(name)
    }


def _on_disk(model: LanguageModel) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    first = model.config.num_hidden_layers
    return {_name_on_disk(name, first): tensor for name, tensor in state_to_layout(state).items()}


def _name_on_disk(name: str, first: int) -> str:
    # The layers of multi-token prediction follow the others, whose last is the one before `first`.
    match = _MTP.fullmatch(name)
    if match is None:
        return name
    own = match[2].removeprefix("block.")
    return f"model.layers.{first + int(match[1])}.{'shared_head.' if own == 'norm.weight' else ''}{own}"


def _copies(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Returns the embedding and the head once more for each layer of multi-token prediction, as published ones have."""
    first, found = model.config.num_hidden_layers, {}
    for depth in range(len(model.mtp)):
        found[f"model.layers.{first + depth}.embed_tokens.weight"] = model.model.embed_tokens.weight
        found[f"model.layers.{first + depth}.shared_head.head.weight"] = model.lm_head.weight
    # safetensors takes no two names for one tensor.
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _config_of(folder: Path, mtp: bool) -> ModelConfig:
    config = read_config(folder)
    depths = config.num_nextn_predict_layers if isinstance(config, LatentConfig) else 0
    if not depths:
        return config
    # transformers passes these layers over, and what it writes says that they are there.
    names = (name for file, _ in _opened(weight_files(folder)) for name in file.keys())  # noqa: SIM118
    if mtp and any(is_of_mtp(name, config.num_hidden_layers, depths) for name in names):
        return config
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def _save_weights(tensors: dict[str, torch.Tensor], folder: Path, bytes_a_file: int) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=bytes_a_file)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": split.metadata["total_size"]}, "weight_map": split.tensor_to_filename}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _opened(files: Iterable[Path]) -> Iterator[tuple[Any, Path]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                yield file, path
        except SafetensorError as error:
            raise Unusable(f"{path.name}: damaged, or no safetensors ({error})") from None


def _check_weights(model: LanguageModel, folder: Path) -> None:
    files = weight_files(folder)
    wanted = {name: list(tensor.shape) for name, tensor in _on_disk(model).items()}
    content = read_json(folder / CONFIG)
    block = block_of(content)
    found: dict[str, _Tensor] = {}
    for file, path in _opened(files):
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            found[name] = _Tensor(path.name, part.get_shape(), part.get_dtype())
    scales: set[str] = set()
    for name, tensor in found.items():
        if name not in wanted:
            continue
        if tensor.shape != wanted[name]:
            raise Unusable(f"{tensor.file}: {name} is {tensor.shape}; config.json makes it {wanted[name]}")
        if tensor.type == fp8.TYPE and block is not None:
            scales.add(_check_scale(name, found, block))
        elif tensor.type not in _TYPES:
            raise Unusable(f"{tensor.file}: {name} is {tensor.type}; weights of floating point are needed")
    what = files[0].name if len(files) == 1 else f"{len(files)} files of weights"
    if missing := sorted(wanted.keys() - found.keys()):
        raise Unusable(f"{what}: without {_names(missing)}, which a {model.config.model_type} of this config.json has")
    more = int(content.get("num_nextn_predict_layers") or 0)
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


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_TOLD:,} more" if len(names) > _NAMES_TOLD else ""
    return ", ".join(names[:_NAMES_TOLD]) + more


def _tokenizer_config(tokenizer: Path, config: ModelConfig) -> dict[str, Any]:
    content = json.loads(tokenizer.read_text())
    spelled = {id_: token for token, id_ in content.get("model", {}).get("vocab", {}).items()}
    special = spelled | {token["id"]: token["content"] for token in content["added_tokens"]}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[config.bos_token_id],
        "eos_token": special[config.eos_token_id],
        "pad_token": special[config.eos_token_id],
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
