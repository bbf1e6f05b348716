"""Settings of the libraries below a training, glibc and torch's own in C++, which these read once, when they start.

Blocks that autograd's thread frees go to an arena of its own, and glibc gives large ones back to the system, which
faults them in again the next step. One arena that keeps what it has, in huge pages, took the default model from 3,350
to 5,000 tokens a second on one core.
"""

import os
import signal
import sys
from collections.abc import Mapping

_TUNABLES = ":".join(
    [
        "glibc.malloc.arena_max=1",
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_max=0",
        "glibc.malloc.trim_threshold=1099511627776",
        "glibc.malloc.top_pad=67108864",
    ]
)
# Torch's warnings about what is meant as it is (`find_unused_parameters`) would come from every process.
SETTINGS = {"GLIBC_TUNABLES": _TUNABLES, "TORCH_CPP_LOG_LEVEL": "ERROR"}
# What torch reads when it is imported; a fork of a process that has done so never reads it.
_READ_ONCE = ("TORCH_CPP_LOG_LEVEL", "TORCH_DISTRIBUTED_DEBUG")


def settle() -> None:
    """Starts this program anew with the settings, in its own process, unless somebody has set glibc's.

    To be called before torch is imported, and where SIGTERM has a handler.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    is_set = "GLIBC_TUNABLES" in os.environ
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not is_set:
        _begin_anew()


def settle_on(variables: Mapping[str, str]) -> None:
    """Sets ``variables``, and starts this program anew where torch, which is imported by now, has read others."""
    is_read = all(os.environ.get(name) == variables[name] for name in _READ_ONCE if name in variables)
    os.environ.update(variables)
    if not is_read:
        _begin_anew()


def _begin_anew() -> None:
    # Handlers are lost. What comes meanwhile waits until this program has one again.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def compute_repeatably() -> None:
    """Has torch refuse what gives other bits from run to run."""
    import torch

    # Not torch.use_deterministic_algorithms, which also imports the compiler, for settings of its own: 1.3 s.
    torch.set_deterministic_debug_mode("error")
    # It would also write NaN into all memory that torch asks for, a quarter of a step's time.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
