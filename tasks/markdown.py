"""Markdown that several parts of the card need."""

import re


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table; a bar inside a cell is escaped, and a cell is one line."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def literal(text: str) -> str:
    """Returns what shows ``text``, which comes from data, as it is: no emphasis, picture or HTML."""
    return re.sub(r"([\\`*_~\[<&])", r"\\\1", text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
