"""The commands that a page of docs/ tells people to paste."""

import re
import shlex
from pathlib import Path

_DOCS = Path(__file__).parent.parent.parent / "docs"


def read(name: str) -> str:
    """Returns docs/NAME.md."""
    return (_DOCS / f"{name}.md").read_text()


def blocks(name: str) -> list[list[list[str]]]:
    """Returns the ``sh`` blocks of docs/NAME.md, each a list of commands, each split as a shell does.

    Blocks without a language need something that no test has (Docker, a service manager).
    """
    return [[shlex.split(line) for line in block.splitlines()] for block in _blocks(name)]


def lines(name: str) -> list[str]:
    """Returns the commands of all ``sh`` blocks of docs/NAME.md as they stand there."""
    return [line for block in _blocks(name) for line in block.splitlines()]


def settings(name: str) -> list[str]:
    """Returns the ``yaml`` blocks of docs/NAME.md."""
    return _blocks(name, "yaml")


def _blocks(name: str, language: str = "sh") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)
