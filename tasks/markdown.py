"""Pieces of Markdown: tables, their cells, and text as it is."""

import re


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table; a bar inside a cell is escaped, and a cell is one line."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def literal(text: str) -> str:
    """Returns what shows ``text``, which comes from data, as it is: no emphasis, picture or HTML."""
    return re.sub(r"([\\`*_~\[<&])", r"\\\1", text)


def cell(text: str) -> str:
    """Returns ``text`` in one line, as a cell of a table shows it."""
    return " ".join(text.split()).replace("|", "\\|")
