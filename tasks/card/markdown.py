"""Markdown that several parts of the card need."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table; a bar inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
