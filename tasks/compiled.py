"""``torch.compile`` for the layers of a model, each by itself.

What a layer computes between its matrix products becomes a few fused kernels. The first steps wait for that; torch
keeps what it has compiled (``TORCHINDUCTOR_CACHE_DIR`` says where), and the next training finds it there. Routed
experts are compiled where one product does for all of them. On a GPU cross-entropy is compiled too, but for one whose
words a mesh cuts. Sums run in another order than uncompiled.
"""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from lm.feed_forward import Experts
from lm.model import LanguageModel
from tasks import paths
from tasks.errors import BadParameter

_VARIANTS = 32


def check() -> None:
    """Raises :class:`BadParameter` where nothing can be compiled: that needs a C++ compiler and Python's headers."""
    missing = []
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        missing.append(f"a C++ compiler ({compiler}; the variable CXX names another one)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python's headers (Python.h)")
    if missing:
        raise BadParameter(
            f"{paths.PARAMS}: train.compile needs {' and '.join(missing)}. Install what is missing (on Debian: g++ "
            "and python3-dev), or set compile: false."
        )


def compile_layers(model: LanguageModel, device: torch.device, backend: str = "inductor") -> None:
    """Has each layer of ``model`` compiled when it is first called, in place; ``backend`` is ``torch.compile``'s."""
    if device.type == "cpu":
        from torch._inductor import config

        # Each process compiles in itself: helpers would compete with the other ranks for the same cores.
        config.compile_threads = 1
    else:
        model.measure = torch.compile(model.measure, backend=backend)
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        # How many tokens come to each changes with every step, and would have to be compiled as often.
        if "forward" in vars(experts):
            # Tokens travel.
            experts.forward = torch.compiler.disable(experts.forward)  # type: ignore[method-assign]
        experts.one_by_one = torch.compiler.disable(experts.one_by_one)  # type: ignore[method-assign]
    from torch import _dynamo

    # All layers are one piece of code; each kind of layer, and of batch, takes some of what torch keeps for it.
    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, _VARIANTS)
    for layer in model.blocks():
        # Its forward alone: what comes before and after it (FSDP's hooks, checkpoints of activations) stays as it is.
        layer.forward = torch.compile(layer.forward, backend=backend)
