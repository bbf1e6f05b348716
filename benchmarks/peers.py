"""What people would use instead of our runtime, each as one pair of functions: read the prompts, write so many tokens.

``llama.cpp`` needs ``llama-cpp-python``, built for this CPU (``CMAKE_ARGS=-DGGML_NATIVE=ON pip install
llama-cpp-python==0.3.36``; where AMX makes it crash, ``-DGGML_NATIVE=OFF`` and the AVX-512 flags), and ``genai`` needs
``pip install onnxruntime-genai==0.18.0 onnx-ir``. What is not installed is left out and named.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Writer(Protocol):
    """One model in one program, writing greedily."""

    def read(self, prompts: Ids) -> None:
        """Reads ``prompts`` [batch, length] after forgetting what was before, and chooses a token after each."""

    def write(self, count: int) -> None:
        """Writes ``count`` more tokens of each text."""


class Graph:
    """Ours: a quantized graph, or the same graph in fp32, in onnxruntime."""

    def __init__(self, folder: Path, threads: int, spin: bool = False) -> None:
        from lm.runtime import Generator

        self._generator = Generator(folder, threads, spin=spin)

    def read(self, prompts: Ids) -> None:
        from lm.batch import PIECE

        self._cache = self._generator.new_cache(len(prompts))
        # As the runtime does it for one text.
        size = PIECE if len(prompts) == 1 else prompts.shape[1]
        for piece in np.split(prompts, range(size, prompts.shape[1], size), axis=1):
            self._step(piece)

    def write(self, count: int) -> None:
        for _ in range(count):
            self._step(self._next)

    def _step(self, ids: Ids) -> None:
        self._next = self._generator.run(ids, self._cache, last=True)[:, -1].argmax(-1)[:, None].astype(np.int64)


class Transformers:
    """``transformers``, forward by forward; compiled, with a cache of one size, as compiled models need it."""

    def __init__(self, folder: Path, threads: int, dtype: str, compiled: bool, most_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch, self._most = torch, most_tokens
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._forward = torch.compile(self._model.forward, dynamic=False) if compiled else self._model.forward
        self._compiled = compiled

    def read(self, prompts: Ids) -> None:
        from transformers import DynamicCache, StaticCache

        if self._compiled:
            self._cache: Any = StaticCache(config=self._model.config, max_cache_len=self._most)
        else:
            self._cache = DynamicCache(config=self._model.config)
        self._length = 0
        self._step(self._torch.from_numpy(prompts))

    def write(self, count: int) -> None:
        for _ in range(count):
            self._step(self._next)

    def _step(self, ids: Any) -> None:
        torch = self._torch
        with torch.inference_mode():
            places = torch.arange(self._length, self._length + ids.shape[1])
            found = self._forward(
                ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, cache_position=places,
                position_ids=places[None].expand(len(ids), -1),
            )  # fmt: skip
            self._length += ids.shape[1]
            self._next = found.logits[:, -1].argmax(-1)[:, None]


class Generate:
    """``transformers``' own ``generate``: what its users call. It reads anew each time, so the reading is taken off."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._inner = Transformers(folder, threads, "float32", False, 0)
        self._model, self._torch = self._inner._model, self._inner._torch

    def read(self, prompts: Ids) -> None:
        self._ids = self._torch.from_numpy(prompts)
        self._generate(1)

    def write(self, count: int) -> None:
        self._generate(count + 1)

    def _generate(self, count: int) -> None:
        with self._torch.inference_mode():
            self._model.generate(
                self._ids, attention_mask=self._torch.ones_like(self._ids), max_new_tokens=count, min_new_tokens=count,
                do_sample=False,
            )  # fmt: skip


class LlamaCpp:
    """llama.cpp on a GGUF file, through the C functions that its own `llama-bench` calls."""

    def __init__(self, file: Path, threads: int, most_tokens: int, batch: int) -> None:
        import llama_cpp

        self._c = c = llama_cpp
        c.llama_log_set(_QUIET, ctypes.c_void_p(0))
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(str(file).encode(), c.llama_model_default_params())
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = most_tokens * batch, 4096, 512, batch
        params.n_threads = params.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, params)
        self._vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._batch = c.llama_batch_init(4096, 0, batch)

    def read(self, prompts: Ids) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._length = 0
        self._step(prompts)

    def write(self, count: int) -> None:
        for _ in range(count):
            self._step(self._next)

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """Returns what follows each of ``ids`` [length], which are a whole text: [length, vocabulary]."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._length = 0
        self._step(ids[None], every=True)
        found = [self._c.llama_get_logits_ith(self._context, place) for place in range(len(ids))]
        return np.stack([np.ctypeslib.as_array(one, (self._vocabulary,)) for one in found])

    def _step(self, ids: Ids, every: bool = False) -> None:
        batch, (rows, length) = self._batch, ids.shape
        batch.n_tokens = rows * length
        for row in range(rows):
            for place in range(length):
                index = row * length + place
                batch.token[index], batch.pos[index] = int(ids[row, place]), self._length + place
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = every or place == length - 1
        if self._c.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self._length += length
        last = [row * length + length - 1 for row in range(rows)]
        found = [
            np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, one), (self._vocabulary,)) for one in last
        ]
        self._next = np.array([[one.argmax()] for one in found], np.int64)


# Kept, since llama.cpp calls it for as long as it lives.
_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class GenAI:
    """onnxruntime-genai on the model that its own builder makes."""

    def __init__(self, folder: Path, most_tokens: int) -> None:
        import onnxruntime_genai as genai

        self._genai, self._most = genai, most_tokens
        self._model = genai.Model(str(folder))

    def read(self, prompts: Ids) -> None:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=self._most, batch_size=len(prompts), do_sample=False)
        self._generator = self._genai.Generator(self._model, params)
        self._generator.append_tokens(prompts.astype(np.int32))
        self._generator.generate_next_token()

    def write(self, count: int) -> None:
        for _ in range(count):
            self._generator.generate_next_token()


def build_genai(source: Path, folder: Path, threads: int) -> None:
    """Makes onnxruntime-genai's INT4 model of the Hugging Face folder ``source``."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    command += ["-i", str(source), "-o", str(folder), "-c", str(folder.with_name("genai-cache"))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    settings = folder / "genai_config.json"
    content = json.loads(settings.read_text())
    options = content["model"]["decoder"]["session_options"]
    options.update(intra_op_num_threads=threads, inter_op_num_threads=1)
    settings.write_text(json.dumps(content))


def quantize_gguf(source: Path, target: Path, kind: str) -> None:
    """Writes ``source`` (fp32) as llama.cpp's own quantizer does it: ``kind`` is Q8_0 or Q4_K_M."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}[kind]
    llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp does not quantize {source} to {kind}")


def bandwidth(threads: int) -> float:
    """Returns the bytes a second that ``threads`` threads read from memory, the best of several tries."""
    import time

    import torch

    torch.set_num_threads(threads)
    block = torch.ones(2**28, dtype=torch.float32)
    best = 0.0
    for _ in range(6):
        for read in (torch.sum, torch.amax):
            started = time.perf_counter()
            read(block)
            best = max(best, block.numel() * 4 / (time.perf_counter() - started))
    return best


def apart(program: str, side: str, folder: Path, threads: int, *more: str) -> dict[str, float]:
    """Returns the JSON object that ``program`` prints last for ``--side`` and ``--folder``, in a process of its own."""
    command = [sys.executable, program, "--side", side, "--folder", str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def installed(module: str) -> bool:
    """Whether ``module`` can be imported."""
    with contextlib.suppress(ImportError):
        __import__(module)
        return True
    return False


Make = Callable[[], Writer]
