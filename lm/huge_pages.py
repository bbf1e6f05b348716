"""A process's memory in huge pages: a token reads each weight once, and the place of each small page is looked up."""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

# Each holds what 512 small ones do.
SIZE = 2 << 20
# From Linux 6.1 on (madvise(2)): at once, and whether or not the system gives huge pages unasked. Older ones refuse it.
_COLLAPSE = 25
# Of mallopt(3): what is larger gets a region of its own, and what the heap's end has more than is given back. The most
# and twice that to which glibc raises the two by itself while it runs.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST_IN_HEAP = 32 << 20
# Private, writable, of no file: "7f00...-7f00... rw-p 00000000 00:00 0".
_REGION = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0 *(?:\[heap\])?$", re.MULTILINE)


def join() -> None:
    """Has what is allocated from now on lie in one region: a layer's weights would have one each, few whole huge pages.

    Where the C library is not glibc, nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_IN_HEAP)


def collapse(maps: Path = Path("/proc/self/maps")) -> int:
    """Moves what this process has written to huge pages, where it fills them; returns how many bytes were moved.

    Nothing that is stored changes, and it takes a second for some 3 GB. Where the system has no huge pages, or none
    left, pages stay as they are: 0 where all do.
    """
    moved = 0
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, length in regions(maps.read_text()):
            moved += length if madvise(start, length, _COLLAPSE) == 0 else 0
    return moved


def regions(maps: str) -> Iterator[tuple[int, int]]:
    """Yields start and length of the whole huge pages that the regions in ``maps`` (proc_pid_maps(5)) have room for."""
    for found in _REGION.finditer(maps):
        start, stop = (int(one, 16) for one in found.groups())
        start, stop = -(-start // SIZE) * SIZE, stop // SIZE * SIZE
        if stop > start:
            yield start, stop - start
