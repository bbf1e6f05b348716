"""What nested mappings hold, each value by the path that leads to it."""

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(content: object, item: str | None = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted path (``models.int8.bits_per_byte.value``) and the value of each leaf, in order.

    Lists are leaves. With ``item`` they are gone into: it says how a path names one of theirs, such as ``[{}]``.
    """
    if isinstance(content, Mapping):
        inner = [(f".{key}", held) for key, held in content.items()]
    elif isinstance(content, list) and item is not None:
        inner = [(item.format(index), held) for index, held in enumerate(content)]
    else:
        yield name, content
        return
    for step, held in inner:
        yield from leaves(held, item, name + step if name else step.removeprefix("."))
