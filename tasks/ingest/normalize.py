"""One spelling for one text: Unicode NFC, ``\\n`` for every newline, no control characters."""

import re
import unicodedata

# Unicode's mandatory breaks (UAX #14, classes BK, CR, LF, NL).
_NEWLINE = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")


def normalize(text: str) -> str:
    """Returns ``text`` in NFC, its newlines as ``\\n``, without control characters other than tab and newline.

    Idempotent. Spaces are left as they are.
    """
    text = _CONTROL.sub("", _NEWLINE.sub("\n", text))
    # After the control characters are gone: what they kept apart may now compose.
    return text if text.isascii() else unicodedata.normalize("NFC", text)
