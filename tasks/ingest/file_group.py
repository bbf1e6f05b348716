"""The group of a text that is a file of its own: by its name it stays in its split, however the text grows.

The code of versions that dealt such files out by their text has no such module: :mod:`flows.champion` looks for it.
"""

import unicodedata
from pathlib import PurePosixPath

from tasks.sources import COMPRESSIONS


def group_of_file(name: str) -> str:
    """Returns the group of the file ``name``, its path below ``data/raw/NAME``: the same when it is packed, and in
    each Unicode form of the name, which is another where macOS has written it.
    """
    path = PurePosixPath(name)
    return unicodedata.normalize("NFC", str(path.with_suffix("") if path.suffix in COMPRESSIONS else path))
