"""The settings of glibc's allocator that training is faster with, which a program reads once, when it starts.

Blocks that autograd's thread frees go to an arena of its own, and glibc gives large ones back to the system, which
faults them in again the next step. One arena that keeps what it has, in huge pages, took the default model from 3,350
to 5,000 tokens a second on one core.
"""

import os
import sys

TUNABLES = ":".join(
    [
        "glibc.malloc.arena_max=1",
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_max=0",
        "glibc.malloc.trim_threshold=1099511627776",
        "glibc.malloc.top_pad=67108864",
    ]
)


def keep_memory() -> None:
    """Starts this program anew with the settings, in its own process; returns where somebody has set some."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
