"""llama.cpp on a GGUF file, in a process of its own: a failed assertion there ends that process and not the tests."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any


def ask(model: Path, *requests: tuple[str, dict[str, Any]]) -> list[Any]:
    """Returns what llama.cpp's server, with ``model`` loaded, answers to each of ``requests`` (path, body)."""
    done = subprocess.run(
        [sys.executable, __file__, model], input=json.dumps(requests), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"llama.cpp ended with {done.returncode}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def continued(model: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Returns the ``tokens`` likeliest ids after each of ``prompts``, one after the other."""
    fixed = {"n_predict": tokens, "temperature": 0, "top_k": 1, "return_tokens": True, "ignore_eos": True, "seed": 0}
    answers = ask(model, *(("/completion", {"prompt": prompt, **fixed}) for prompt in prompts))
    return [answer["tokens"] for answer in answers]


def tokenized(model: Path, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text, what the model adds to one included; special tokens spelled in it are plain."""
    answers = ask(
        model, *(("/tokenize", {"content": text, "add_special": True, "parse_special": False}) for text in texts)
    )
    return [answer["tokens"] for answer in answers]


def _serve() -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    # What it keeps of earlier tokens would be fp16.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    answers = []
    for path, body in json.load(sys.stdin):
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            answers.append(json.load(answer))
    print(json.dumps(answers), flush=True)
    # Without stopping the server, which waits for its own end for ever in one of a hundred times.
    os._exit(0)


if __name__ == "__main__":
    _serve()
