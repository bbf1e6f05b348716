"""The commands that a page of docs/ tells people to paste."""

import re
import shlex
from pathlib import Path

_DOCS = Path(__file__).parent.parent.parent / "docs"


def blocks(name: str) -> list[list[list[str]]]:
    """Returns the ``sh`` blocks of docs/NAME.md, each a list of commands, each split as a shell does.

    Blocks without a language need something that no test has (Docker, a service manager).
    """
    found = re.findall(r"^```sh\n(.*?)^```", (_DOCS / f"{name}.md").read_text(), re.MULTILINE | re.DOTALL)
    return [[shlex.split(line) for line in block.splitlines()] for block in found]
