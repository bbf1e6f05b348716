"""A model that llama.cpp has split into several GGUF files. Imports no torch."""

import re
from pathlib import Path

from lm.gguf_tensors import Unfit

_SPLIT = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


def files_of(path: Path) -> list[Path]:
    """Returns the files of a model of which ``path`` is the first: itself, or those that llama.cpp has split it into.

    Those are named MODEL-00001-of-00003.gguf and so on. Raises :class:`Unfit` where one is missing.
    """
    named = _SPLIT.fullmatch(path.name)
    if named is None or not int(named["count"]):
        return [path]
    count = int(named["count"])
    files = [path.with_name(f"{named['name']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if path != files[0]:
        raise Unfit(f"it is a part of a model; the first part is {files[0].name}")
    if missing := [file.name for file in files if not file.is_file()]:
        raise Unfit(f"it is the first of {count} parts, and {missing[0]} is missing beside it")
    return files
