"""Which files of a folder in Hugging Face layout belong to its checkpoint. Imports no torch."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lm.config import ModelConfig
from lm.hugging_face_config import Unusable, config_from_json

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
# What else says how the tokenizer is used, a chat is written, and text is generated.
_COMPANIONS = (
    GENERATION,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# What tokenizers were read from before they had a file for all.
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json")
# Where those of a model with several chat templates lie that have a name.
_MORE_TEMPLATES = "additional_chat_templates"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_pickle(path: Path) -> bool:
    """Whether ``path`` is, by its name, one of the files in which torch keeps weights as pickles."""
    return path.suffix in _PICKLES


def companions(folder: Path) -> list[Path]:
    """Returns those files in ``folder`` beside its weights that are kept as they are, relative to it."""
    templates = sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
    found = [folder / name for name in _COMPANIONS if (folder / name).is_file()]
    return [file.relative_to(folder) for file in (*found, *templates)]


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the files in ``folder`` that make up its checkpoint. Raises :class:`Unusable` where one is missing."""
    read_config(folder)
    if not (folder / TOKENIZER).is_file():
        raise Unusable(_without_tokenizer(folder))
    index = [folder / INDEX] if (folder / INDEX).is_file() else []
    beside = [folder / name for name in companions(folder)]
    for file in (folder / TOKENIZER, *beside):
        _check_inside(file, folder)
    return [folder / CONFIG, folder / TOKENIZER, *beside, *index, *weight_files(folder)]


def _without_tokenizer(folder: Path) -> str:
    told = f"{TOKENIZER}: no such file; a model needs the tokenizer that it was trained with"
    found = next((name for name in _OTHER_TOKENIZERS if (folder / name).is_file()), None)
    if found is None:
        return told
    return (
        f"{told}. There is {found}, of which transformers, with sentencepiece, writes it: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _check_inside(file: Path, folder: Path) -> None:
    """Raises :class:`Unusable` where ``file`` is a link that leads out of ``folder``: it may be nobody's business.

    Nobody looks into it before it is kept. Caches, such as the Hub's, have links for all files, its configuration too.
    """
    place, config = file.resolve(), (folder / CONFIG).resolve()
    if config.is_relative_to(folder.resolve()) and not place.is_relative_to(folder.resolve()):
        name = file.relative_to(folder)
        raise Unusable(f"{name}: a link to {place}, outside the folder; put the file itself there if it belongs to it")


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold the weights. Raises :class:`Unusable` that names one that is missing."""
    if (folder / INDEX).is_file():
        try:
            names = sorted({str(name) for name in read_json(folder / INDEX)["weight_map"].values()})
        except (KeyError, AttributeError):
            raise Unusable(f"{INDEX}: it has no weight_map, which says where the tensors lie") from None
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise Unusable(f"{INDEX}: it names {name}; files of safetensors in the same folder are needed")
            if not (folder / name).is_file():
                raise Unusable(f"{name}: no such file, though {INDEX} names it")
        if not names:
            raise Unusable(f"{INDEX}: it names no file")
        return [folder / name for name in names]
    if not (folder / WEIGHTS).is_file():
        if pickles := sorted(path.name for path in folder.iterdir() if is_pickle(path)):
            raise Unusable(f"{pickles[0]}: a pickle, which can run code when it is read; convert it to {WEIGHTS}")
        raise Unusable(f"{WEIGHTS}: no such file, nor {INDEX}")
    return [folder / WEIGHTS]


def is_of_mtp(name: str, layers: int, depths: int) -> bool:
    """Whether the tensor ``name`` is of one of the ``depths`` layers of multi-token prediction behind ``layers``."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and 0 <= int(layer[1]) - layers < depths


def read_config(folder: Path) -> ModelConfig:
    """Returns the configuration in ``folder``. Raises :class:`Unusable` that says what is wrong with it.

    A text begins with what the way to generate says, where it says so: some checkpoints' configurations still have
    what the model began with that they were trained from (DeepSeek-R1-Distill-Qwen's).
    """
    if not (folder / CONFIG).is_file():
        raise Unusable(f"{CONFIG}: no such file")
    content = read_json(folder / CONFIG)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    # Whoever writes texts with the model would be the first to look.
    for name, there in ((CONFIG, content), (GENERATION, generation)):
        for key in ("bos_token_id", "eos_token_id"):
            _token_ids(name, there, key)
    if "bos_token_id" in content and isinstance(bos := generation.get("bos_token_id"), int):
        content["bos_token_id"] = bos
    return config_from_json(content)


def read_ends(folder: Path) -> list[int]:
    """Returns the tokens that end a text: those of the way to generate, of the configuration where it names none.

    Raises :class:`Unusable` that says what is wrong with a file.
    """
    for name in (GENERATION, CONFIG):
        if (folder / name).is_file() and (ends := _token_ids(name, read_json(folder / name), "eos_token_id")):
            return ends
    return []


def _token_ids(name: str, content: Mapping[str, Any], key: str) -> list[int]:
    """Returns the ids that the file ``name`` has for ``key``: one, several or none."""
    found = content.get(key)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(not isinstance(id_, int) or isinstance(id_, bool) or id_ < 0 for id_ in ids):
        raise Unusable(f"{name}: {key} is {found!r}; a whole number, or a list of them, is needed")
    return ids


@contextlib.contextmanager
def system_is_told(path: Path) -> Iterator[None]:
    """Raises the system's :class:`OSError` where safetensors cannot write ``path``, by which a full disk is told.

    safetensors passes on its words alone.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping in ``path``. Raises :class:`Unusable` where it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{path.name}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise Unusable(f"{path.name}: a mapping is needed, found {type(content).__name__}")
    return content
