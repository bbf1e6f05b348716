"""Which experts each token chose: in the float model, and in an INT8 graph, which is read and not imitated.

The graph is the one that ships, with its choices as further outputs; no node that computes is added or changed. The
float model tells through a hook. Batches are scored side by side on threads, so each thread's choices are its own.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper

from lm.cache import Cache
from lm.feed_forward import Router
from lm.model import LanguageModel
from lm.onnx_model import choices
from lm.runtime import Generator
from tasks.errors import BadInput

Ids = npt.NDArray[np.int64]
# [layers, batch, length, experts a token], sorted: which one came first among the chosen says nothing.
Chosen = npt.NDArray[np.int64]


class FloatRouting:
    """The float model, and what its routers chose in the calling thread's last forward pass."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.vocab_size = model.config.vocab_size
        self._of_thread = threading.local()
        for router in model.routers():
            router.register_forward_hook(self._note)

    def run(self, ids: Ids) -> tuple[torch.Tensor, Chosen]:
        """Returns hidden states [batch, length, hidden] and the experts of each token."""
        self._of_thread.noted = []
        x_BTD: torch.Tensor = self._model.model(torch.from_numpy(ids))
        return x_BTD, _sorted([experts.numpy() for experts in self._of_thread.noted], ids)

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the logits [batch, length, vocabulary] of hidden states."""
        logits: torch.Tensor = self._model.lm_head(x_BTD)
        return logits

    def _note(self, router: Router, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._of_thread.noted.append(output[0])


class Int8Routing:
    """The graph in ``folder`` with its choices as outputs."""

    def __init__(self, folder: Path, model: LanguageModel) -> None:
        """``model`` names the routers. Raises :class:`BadInput` where the graph has other ones."""
        self._names = [choices(name) for name, module in model.named_modules() if isinstance(module, Router)]
        graph = folder / "model.onnx"
        self._generator = Generator(folder, threads=1, graph=_with_outputs(graph, self._names) if self._names else None)

    def new_cache(self, batch: int) -> Cache:
        """Returns the cache before the first token of ``batch`` texts."""
        return self._generator.new_cache(batch)

    def run(self, ids: Ids, cache: Cache) -> tuple[torch.Tensor, Chosen]:
        """Returns logits [batch, length, vocabulary] of ``ids``, which come after ``cache``, and each one's experts."""
        logits, chosen = self._generator.observe(ids, cache, self._names)
        return torch.from_numpy(logits), _sorted(chosen, ids)


def _with_outputs(path: Path, names: list[str]) -> bytes:
    model = onnx.load(path, load_external_data=False)
    made = {name for node in model.graph.node for name in node.output}
    for name in names:
        if name not in made:
            raise BadInput(f"{path}: it does not tell what its routers choose ('{name}'). Rerun the stage 'quantize'.")
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["tokens", "experts"]))
    content: bytes = model.SerializeToString()
    return content


def _sorted(layers: list[npt.NDArray[np.int64]], ids: Ids) -> Chosen:
    if not layers:
        return np.zeros((0, *ids.shape, 0), np.int64)
    return np.sort(np.stack(layers), axis=-1).reshape(len(layers), *ids.shape, -1)
