"""docs/start-from-a-checkpoint.md: stages take its settings, and it names the families that are built."""

import copy
import re
from pathlib import Path
from typing import Any, get_args

import page
import pytest

from lm import gguf_keys, gguf_tokenizer
from lm.config import Architecture
from tasks.params import Params
from tasks.section import parse_yaml, read_yaml, validate

PARAMS = Path(__file__).parents[1] / "params.yaml"
PAGE = "start-from-a-checkpoint"
BLOCKS = page.settings(PAGE)


def put(changes: dict[str, Any], content: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(name), dict):
            put(value, content[name])
        else:
            content[name] = value


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_its_settings_are_taken(number: int) -> None:
    content = copy.deepcopy(read_yaml(PARAMS))
    for block in (BLOCKS[0], BLOCKS[number]):
        changes = parse_yaml(block.encode(), Path(PAGE))
        put(changes, content)
    validate(Params, content, PARAMS)


def test_it_names_the_families_that_are_built() -> None:
    rows = re.findall(r"^\| (`[a-z].*?) \| (`.*?) \|", page.read(PAGE), re.MULTILINE)
    families, in_gguf = (re.findall(r"`(\w+)`", " ".join(column)) for column in zip(*rows, strict=True))
    built = {name for kind in get_args(Architecture) for name in get_args(kind.model_fields["model_type"].annotation)}
    assert set(families) == built
    assert set(in_gguf) == set(gguf_keys.ARCHITECTURES)


def test_it_names_the_ways_to_cut_a_text_that_are_known_of_a_gguf_file() -> None:
    (listed,) = re.findall(r"ways that are known here\s\((.*?)\)", page.read(PAGE), re.DOTALL)
    assert set(gguf_tokenizer.PIECES) <= set(re.findall(r"`(.*?)`", listed))
