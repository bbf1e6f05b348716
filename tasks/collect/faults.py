"""What keeps a file from being copied, in one line, and whether trying again may help."""

import errno
from pathlib import PurePath

from tasks.errors import BadInput, TryAgain
from tasks.sources import Source, printable

# A file server or disk that does not answer now may do so in a minute.
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOTCONN, errno.ECONNRESET),
}
_CURES = {
    errno.EACCES: "Mend its permissions or remove it.",
    errno.EPERM: "Mend its permissions or remove it.",
    errno.ELOOP: "The link leads back to itself: mend or remove it.",
    errno.ENAMETOOLONG: "Shorten the name.",
}


def unreadable(source: Source, path: PurePath | str, error: OSError) -> BadInput | TryAgain:
    """Returns the error to raise for ``path``, which the system refused to read with ``error``."""
    found = f"source '{source.name}': {printable(path)}: cannot be read ({error.strerror})."
    if isinstance(error, FileNotFoundError):
        return TryAgain(f"source '{source.name}': {printable(path)}: vanished while it was collected. Run again.")
    if error.errno in _PASSING:
        return TryAgain(f"{found} Run again when the place answers.")
    return BadInput(f"{found} {_CURES.get(error.errno or 0, 'Mend or remove it.')}")
