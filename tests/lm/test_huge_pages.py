"""Memory that is moved to huge pages: which regions, and that what is stored there stays."""

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm import huge_pages

MAPS = """\
55d0a0000000-55d0a4100000 rw-p 00000000 00:00 0                          [heap]
7f0000100000-7f0000f00000 rw-p 00000000 00:00 0
7f0010100000-7f00103ff000 rw-p 00000000 00:00 0
7f0020000000-7f0024000000 rw-p 00000000 fe:01 1234                       /weights.bin
7f0030000000-7f0034000000 r--p 00000000 00:00 0
7f0040000000-7f0044000000 rw-s 00000000 00:00 0
7ffd00000000-7ffd04000000 rw-p 00000000 00:00 0                          [stack]
"""


def test_regions_of_no_file_are_moved_as_far_as_they_are_whole_huge_pages() -> None:
    assert list(huge_pages.regions(MAPS)) == [(0x55D0A0000000, 0x4000000), (0x7F0000200000, 0xC00000)]


def test_what_is_stored_stays() -> None:
    size = 16 * huge_pages.SIZE
    values = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint32)
    expected = np.arange(len(values), dtype=np.uint32)
    values[:] = expected
    moved = huge_pages.collapse()
    assert np.array_equal(values, expected)
    # From Linux 6.1 on, if it was built with them.
    if Path("/sys/kernel/mm/transparent_hugepage").is_dir() and _linux() >= (6, 1):
        assert moved
        assert _in_huge_pages() >= size - 2 * huge_pages.SIZE


def test_a_system_that_tells_no_regions_is_left_alone(tmp_path: Path) -> None:
    assert huge_pages.collapse(tmp_path / "missing") == 0


def test_a_system_without_the_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_COLLAPSE", -1)
    assert huge_pages.collapse() == 0


def _linux() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split(".")[:2])


def _in_huge_pages() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


_BLOCKS = f"""
import ctypes
from lm import huge_pages
malloc = ctypes.CDLL(None).malloc
malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
for joined in (False, True):
    if joined:
        huge_pages.join()
    blocks = [malloc({3 << 20}) for _ in range(16)]
    starts = [region for region in open("/proc/self/maps") if region.rstrip().endswith("[heap]")]
    low, high = (int(end, 16) for end in starts[0].split()[0].split("-"))
    print(sum(low <= block < high for block in blocks))
"""


def test_blocks_lie_in_one_region_once_that_is_asked_for() -> None:
    # A training's environment has malloc do so from the start.
    own = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    ran = subprocess.run([sys.executable, "-c", _BLOCKS], env=own, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["0", "16"]
