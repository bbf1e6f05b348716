"""Where a model's folder keeps its chat template, and what that may name. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from lm.hugging_face_files import CHAT_TEMPLATE

SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"


class Malformed(ValueError):
    """A template that is not in jinja2's language, or a file that should name one and cannot be read."""


def source_in(folder: Path) -> tuple[Path, str] | None:
    """Returns the template's text of the model in ``folder``, and where it stands there; None where there is none.

    Raises :class:`Malformed` where it cannot be read.
    """
    place = folder / CHAT_TEMPLATE
    if place.is_file():
        try:
            return place, place.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise Malformed(f"{place}: not UTF-8") from None
    found = _older(folder / SETTINGS, settings_in(folder).get("chat_template"))
    return None if found is None else (folder / SETTINGS, found)


def settings_in(folder: Path) -> dict[str, Any]:
    """Returns what ``tokenizer_config.json`` in ``folder`` says; nothing where it is not there.

    Raises :class:`Malformed` where it cannot be read.
    """
    return _object_in(folder / SETTINGS)


def _object_in(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{file}: damaged, or not what its name says ({error})") from None
    if not isinstance(content, dict):
        raise Malformed(f"{file}: no JSON object")
    return content


def _older(file: Path, entry: object) -> str | None:
    """Returns the template in ``tokenizer_config.json``, where it stood before it had a file: a text, or named ones."""
    if isinstance(entry, list):
        if not all(isinstance(one, dict) for one in entry):
            raise Malformed(f"{file}: chat_template lists what is no object with a name and a template")
        entry = next((one.get("template") for one in entry if one.get("name") == "default"), None)
    return entry if isinstance(entry, str) else None


def special_tokens(folder: Path) -> dict[str, str]:
    """Returns ``bos_token``, ``eos_token`` and others of the model in ``folder`` by their names.

    Older releases of transformers had a file of its own for them. It goes first, but for where
    ``tokenizer_config.json`` describes all added tokens: so transformers has it. Each token is a text, or a description
    with one. Raises :class:`Malformed` where a file cannot be read.
    """
    settings = settings_in(folder)
    if "added_tokens_decoder" not in settings:
        settings |= _object_in(folder / SPECIAL_TOKENS)
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in settings.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}
